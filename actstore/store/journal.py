"""The journal: times, hosts and events of runs, outside identity; one sealed document a line (docs/format.md §9)."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore.errors import CorruptStore
from actstore.sealed import seal, translate_full_disk, unseal

from .files import make_directory
from .location import Location

__all__ = ["Journal", "JournalledRun", "last_runs", "read_runs"]

NAMED_BY = "%Y%m%dT%H%M%SZ"  # when a journal was begun, UTC


class Journal:
    """One run's events, appended as they happen."""

    def __init__(self, root: Path) -> None:
        started = time.strftime(NAMED_BY, time.gmtime())
        self.path = root / "journal" / f"{started}-{uuid.uuid4().hex[:8]}.jsonl"
        make_directory(self.path.parent)

    def write(self, event: str, **facts: Any) -> None:
        """Append an event with the time, host and process; raises NoSpace where the disk is full."""
        line = {"event": event, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), **facts}
        with translate_full_disk(self.path), self.path.open("ab") as file:
            file.write(seal(line))


@dataclass(frozen=True)
class JournalledRun:
    """One process' run of a pass, as its journal says.

    began, ended: times of its first and last line, seconds since 1970. report: how it went; None where it was killed or
    made nothing.
    """

    pass_id: str
    host: str
    pid: int
    began: float
    ended: float
    report: dict[str, Any] | None


def read_runs(location: Location, since: float = 0.0) -> Iterator[JournalledRun]:
    """Yield the runs that a store's journal tells of, in the order of their beginning, from a time on.

    A line that is torn or not what was written says nothing: it is `verify` that reports it.
    """
    first = time.strftime(NAMED_BY, time.gmtime(since))
    for name in (name for name in location.names("journal") if name >= first):
        events = []
        for line in location.read(f"journal/{name}").splitlines(keepends=True):
            with suppress(CorruptStore):
                events.append(unseal(line, name))
        if events and events[0]["event"] == "begin":
            first_line, last_line = events[0], events[-1]
            with suppress(KeyError):  # of another program
                who = first_line["pass_id"], first_line["host"], first_line["pid"]
                yield JournalledRun(*who, first_line["time"], last_line["time"], last_line.get("report"))


def last_runs(runs: Iterable[JournalledRun]) -> dict[str, list[JournalledRun]]:
    """Return of each pass the run with a report that ended last, with all that were at work at once with it.

    At once means that one began before another had ended; they come in the order of their ends.
    """
    found: dict[str, list[JournalledRun]] = {}
    for run in sorted((one for one in runs if one.report), key=lambda one: one.ended, reverse=True):
        at_once = found.setdefault(run.pass_id, [])
        if not at_once or run.ended > min(one.began for one in at_once):
            at_once.insert(0, run)
    return found
