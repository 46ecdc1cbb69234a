"""The journal: times, hosts and events of runs, outside identity; one sealed document a line (docs/format.md §9)."""

from __future__ import annotations

import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from actstore.errors import CorruptStore
from actstore.sealed import seal, translate_full_disk, unseal

from .files import make_directory
from .location import Location

__all__ = ["Journal", "run_reports"]


class Journal:
    """One run's events, appended as they happen."""

    def __init__(self, root: Path) -> None:
        started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self.path = root / "journal" / f"{started}-{uuid.uuid4().hex[:8]}.jsonl"
        make_directory(self.path.parent)

    def write(self, event: str, **facts: Any) -> None:
        """Append an event with the time, host and process; raises NoSpace where the disk is full."""
        line = {"event": event, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), **facts}
        with translate_full_disk(self.path), self.path.open("ab") as file:
            file.write(seal(line))


def run_reports(location: Location) -> dict[str, dict[str, Any]]:
    """Return what the journal says of how each pass's last run went that made anything, by pass.

    A line that is torn or not what was written says nothing: it is `verify` that reports it.
    """
    ends: dict[str, dict[str, Any]] = {}
    for name in location.names("journal"):
        for line in location.read(f"journal/{name}").splitlines(keepends=True):
            with suppress(CorruptStore):
                event = unseal(line, name)
                if event.get("report") and event["time"] >= ends.get(event["pass_id"], event)["time"]:
                    ends[event["pass_id"]] = event
    return {pass_id: end["report"] for pass_id, end in ends.items()}
