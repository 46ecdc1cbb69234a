"""The journal: times, hosts and events of runs, outside identity; one sealed document a line (docs/format.md §9)."""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from actstore.sealed import seal, translate_full_disk

from .files import make_directory

__all__ = ["Journal"]


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
