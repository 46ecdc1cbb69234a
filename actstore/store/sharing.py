"""Kit pieces shared between the stores of one machine: hard links through a folder in the local cache.

A piece of which only the cache's name is left belongs to no store any more and is removed, so nothing is kept alive
unseen. Where the cache is on another file system, or cannot be written, nothing is shared: a copy would save nothing.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from actstore.sealed import partial_path, publish, sha256_of_file
from actstore.settings import cache_directory

__all__ = ["forget_unused", "publish_shared"]


def publish_shared(partial: Path, path: Path, digest: str) -> None:
    """Give a finished, fsynced piece its name; where another store has it already, as a link to that one's bytes."""
    cached = _folder() / path.name
    with suppress(OSError):
        if cached.exists() and sha256_of_file(cached) == digest:
            _link_over(cached, partial)
    publish(partial, path)
    with suppress(OSError):
        cached.parent.mkdir(parents=True, exist_ok=True)
        forget_unused()
        if not (cached.exists() and cached.samefile(path)):
            cached.unlink(missing_ok=True)  # it is damaged
            os.link(path, cached)


def forget_unused() -> None:
    """Remove the cache's name of every piece that no store on this machine has any more."""
    for cached in _folder().glob("*.zip"):
        with suppress(OSError):
            if cached.stat().st_nlink == 1:
                cached.unlink()


def _folder() -> Path:
    return cache_directory() / "kit"


def _link_over(source: Path, target: Path) -> None:
    """Replace a file by a link; it stays what it is where links are impossible."""
    linked = partial_path(target)
    os.link(source, linked)
    linked.replace(target)
