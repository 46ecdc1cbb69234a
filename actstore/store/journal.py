"""The journal: times, hosts and events of runs, outside identity; one sealed document a line (docs/format.md §9)."""

from __future__ import annotations

import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from actstore.sealed import seal

__all__ = ["Journal"]


class Journal:
    """One run's events, appended as they happen."""

    def __init__(self, root: Path) -> None:
        started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self.path = root / "journal" / f"{started}-{uuid.uuid4().hex[:8]}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, **facts: Any) -> None:
        """Append an event with the time, host and process."""
        line = {"event": event, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), **facts}
        with self.path.open("ab") as file:
            file.write(seal(line))
