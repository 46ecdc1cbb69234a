"""Where an export goes: nothing is there before, and all of it or nothing after."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actstore.errors import InvalidInput, MissingInput, explain
from actstore.sealed import partial_path, publish, translate_full_disk

__all__ = ["Exported", "exported", "must_be_free", "new_target"]


@dataclass(frozen=True)
class Exported:
    """What an export wrote: files below `path` (or `path` itself, and what lies beside it) and their bytes."""

    path: Path
    n_rows: int
    n_files: int
    n_bytes: int


def exported(path: Path, n_rows: int, *beside: Path) -> Exported:
    """Return what lies at `path` now, and in the files beside it."""
    files = [file for root in (path, *beside) for file in ([root] if root.is_file() else root.rglob("*"))]
    sizes = [file.stat().st_size for file in files if file.is_file()]
    return Exported(path, n_rows, len(sizes), sum(sizes))


def must_be_free(path: Path) -> None:
    """Raise InvalidInput where something is at `path`, MissingInput where its directory is not there."""
    if path.exists() or path.is_symlink():
        raise InvalidInput(explain(f"{path} is there already", next_step="remove it, or choose another --out"))
    if not path.parent.is_dir():
        raise MissingInput(
            explain(f"There is no directory {path.parent}", next_step=f"make it: mkdir -p {path.parent}")
        )


@contextmanager
def new_target(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write a file or directory under; it gets the name `path` when all went well.

    Raises InvalidInput where `path` is there already, NoSpace where the disk is full. What was begun is removed then.
    """
    must_be_free(path)
    partial = partial_path(path)
    with translate_full_disk(path):
        try:
            yield partial
            _make_durable(partial)
            must_be_free(path)  # a rename would replace what came meanwhile
            publish(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            partial.unlink(missing_ok=True)


def _make_durable(partial: Path) -> None:
    below = sorted(partial.rglob("*")) if partial.is_dir() else []
    for one in [*below, partial]:
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
