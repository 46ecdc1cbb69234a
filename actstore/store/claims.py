"""Who works on what: claims on shards, and the lock of the store (docs/format.md §7).

A claim is a file created exclusively. Its owner touches it while it works; a claim whose owner is dead is taken over.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from actstore.errors import StoreBusy, explain
from actstore.sealed import canonical_json

__all__ = ["HEARTBEAT_SECONDS", "STALE_SECONDS", "Claim", "claim", "exclusive"]

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 120.0  # on another host, where we cannot ask whether the process lives


@contextmanager
def exclusive(root: Path, name: str = "lock", *, wait_seconds: float = 60.0) -> Iterator[None]:
    """Hold a lock of the store, by default the one for layout and catalog; the kernel frees it when its holder dies.

    Raises StoreBusy where somebody else holds it for longer than `wait_seconds`.
    """
    with (root / name).open("a") as file:
        _flock(file.fileno(), root, wait_seconds)
        yield


def _flock(descriptor: int, root: Path, wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StoreBusy(
                    explain(
                        f"The store {root} is being changed by another process (waited {wait_seconds:.0f} s)",
                        next_step="wait for it to end and run the same command again",
                    )
                ) from None
            time.sleep(0.05)


class Claim:
    """The right to write one shard of one pass; a context manager that gives it back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name=f"claim {path.name}")

    def __enter__(self) -> Claim:
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heart.join()
        self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with suppress(FileNotFoundError):
                os.utime(self.path)


def claim(path: Path) -> Claim | None:
    """Return a claim on what `path` stands for, or None while a living owner has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _create(path):
        return Claim(path)
    with (path.parent / "takeover").open("a") as file:
        # One at a time: else a second taker could remove the claim that the first has just made.
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        if _is_dead(path):
            path.unlink(missing_ok=True)
        return Claim(path) if _create(path) else None


def _create(path: Path) -> bool:
    """Create the claim with its owner inside, at once: a claim is never seen without one."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    draft.write_bytes(canonical_json(_owner()))
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _owner() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def _start_of(pid: int) -> str | None:
    """Return when a process of this host began, in its kernel's own words; None where it is gone or cannot be asked."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]  # a zombie has died already


def _is_dead(path: Path) -> bool:
    """Return whether a claim's owner is gone: its process on this host, or its heartbeat elsewhere."""
    try:
        owner, age_seconds = json.loads(path.read_bytes()), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True
    except ValueError:
        return True
    if owner.get("host") != socket.gethostname() or not Path("/proc/self/stat").exists():
        return age_seconds > STALE_SECONDS
    return bool(_start_of(int(owner["pid"])) != owner["started"])
