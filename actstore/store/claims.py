"""Who works on what: claims on shards, and the lock of the store (docs/format.md §7).

A claim is a file created exclusively. Its owner touches it while it works; a claim whose owner is dead is taken over.
Whoever works on a pass shares the lock `claims.lock`; who must know that nobody does takes it alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from actstore.errors import StoreBusy, explain
from actstore.sealed import PARTIAL_SUFFIX, canonical_json, translate_full_disk

from .files import make_directory

__all__ = [
    "CLAIMS",
    "CLAIMS_LOCK",
    "HEARTBEAT_SECONDS",
    "LOCK_SECONDS",
    "STALE_SECONDS",
    "Claim",
    "at_work",
    "claim",
    "exclusive",
    "no_claims",
]

CLAIMS, CLAIMS_LOCK = "claims", "claims.lock"

HEARTBEAT_SECONDS = 5.0
LOCK_SECONDS = 3600.0  # another process may be tokenising a large corpus, proving SAEs or every byte, or indexing
STALE_SECONDS = 120.0  # on another host or in another container, where we cannot ask whether the process lives


@contextmanager
def exclusive(root: Path, name: str = "lock", *, wait_seconds: float = 60.0) -> Iterator[None]:
    """Hold a lock of the store, by default the one for layout and catalog; the kernel frees it when its holder dies.

    Raises StoreBusy where somebody else holds it for longer than `wait_seconds`.
    """
    with _flock(root, name, fcntl.LOCK_EX, wait_seconds):
        yield


@contextmanager
def _flock(root: Path, name: str, kind: int, wait_seconds: float) -> Iterator[None]:
    with translate_full_disk(root / name):
        file = (root / name).open("a+")  # NFS shares a lock only of what is open for reading
    with file:
        _wait_for(file.fileno(), kind, root, wait_seconds)
        yield


def _wait_for(descriptor: int, kind: int, root: Path, wait_seconds: float) -> None:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
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


@contextmanager
def at_work(root: Path) -> Iterator[None]:
    """Keep away who must know that nobody writes: enter it with the store's lock held, leave it with the pass sealed.

    So nothing is dropped of what was read under that lock.
    """
    with _flock(root, CLAIMS_LOCK, fcntl.LOCK_SH, LOCK_SECONDS):
        yield


@contextmanager
def no_claims(root: Path) -> Iterator[None]:
    """Keep everybody from working and claiming; the claims that are there are of the dead, and go.

    Raises StoreBusy while somebody is at work, or a living owner has a claim.
    """
    with _flock(root, CLAIMS_LOCK, fcntl.LOCK_EX, 0.0):
        for path in sorted((root / CLAIMS).glob("*/*.json")):
            if not _is_dead(path):
                raise StoreBusy(
                    explain(
                        f"{root} is being extracted into (claim {path.relative_to(root)})",
                        next_step="wait until the extraction has ended, then run the same command again",
                    )
                )
        shutil.rmtree(root / CLAIMS, ignore_errors=True)
        yield


class Claim:
    """The right to write one shard of one pass; a context manager that gives it back."""

    def __init__(self, path: Path, held: ExitStack) -> None:
        self.path, self._held = path, held
        self._owner = path.read_bytes()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name=f"claim {path.name}")

    def __enter__(self) -> Claim:
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heart.join()
        with suppress(FileNotFoundError):
            if self.path.read_bytes() == self._owner:  # else it was taken over: this process was thought to be dead
                self.path.unlink()
        self._held.close()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with suppress(FileNotFoundError):
                os.utime(self.path)


def claim(path: Path, root: Path) -> Claim | None:
    """Return a claim on what `path` stands for in the store at `root`, or None while a living owner has it.

    Raises NoSpace where the disk is full.
    """
    with ExitStack() as stack:
        stack.enter_context(_flock(root, CLAIMS_LOCK, fcntl.LOCK_SH, LOCK_SECONDS))
        while True:
            # The directory goes when its pass is sealed, which may be while we look at it.
            with suppress(FileNotFoundError):
                return Claim(path, stack.pop_all()) if _take(path) else None


def _take(path: Path) -> bool:
    make_directory(path.parent)
    if _create(path):
        return True
    with (path.parent / "takeover").open("a") as file:
        # One at a time: else a second taker could remove the claim that the first has just made.
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        if _is_dead(path):
            path.unlink(missing_ok=True)
        return _create(path)


def _create(path: Path) -> bool:
    """Create the claim with its owner inside, at once: a claim is never seen without one."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")
    try:
        with translate_full_disk(path):
            draft.write_bytes(canonical_json(_owner()))
            path.hardlink_to(draft)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def _owner() -> dict[str, Any]:
    process = {"host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid())}
    return {**process, "namespace": _namespace(), "claim": uuid.uuid4().hex}


def _namespace() -> str | None:
    """Return what numbers of processes are counted in, as containers may share a host's name; None if not known."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """Return when a process of this host began, in its kernel's own words; None where it is gone or cannot be asked."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]  # a zombie has died already


def _is_dead(path: Path) -> bool:
    """Return whether a claim's owner is gone: its process where we can ask for it, or its heartbeat elsewhere."""
    try:
        owner, age_seconds = json.loads(path.read_bytes()), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return True
    except ValueError:
        return True
    here = owner.get("host") == socket.gethostname() and owner.get("namespace") in (None, _namespace())
    if not here or not Path("/proc/self/stat").exists():
        return age_seconds > STALE_SECONDS
    return bool(_start_of(int(owner["pid"])) != owner["started"])
