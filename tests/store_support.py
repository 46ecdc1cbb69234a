"""Stores to take apart: a finished one, one whose extraction was stopped, and comparisons of all that is in them."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny_world import extract

from actstore.api import Store
from actstore.index import TABLES
from actstore.sealed import PARTIAL_SUFFIX, read_sealed, write_sealed

__all__ = [
    "Stopped",
    "copy_of_finished",
    "extract_some",
    "finished",
    "hashes",
    "home",
    "index_content",
    "reseal",
    "same_bits",
    "stopping_after",
    "truth",
]


class Stopped(Exception):
    """Raised by a report to end an extraction where a test wants it to end."""


@cache
def finished() -> Path:
    """Return a complete, indexed store that nobody may change; it goes when the process ends."""
    store = home() / "finished.act"
    assert extract(store).complete
    return store


def home() -> Path:
    """Return a folder for what is made once a process; it goes when the process ends."""
    return Path(_home().name)


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tiny-stores-")


def copy_of_finished(folder: Path) -> Path:
    """Return a copy of the finished store, to be changed."""
    return Path(shutil.copytree(finished(), folder / "copy.act"))


def stopping_after(n_shards: int) -> Callable[..., None]:
    """Return a report that ends the extraction when so many shards are done."""

    def report(doing: str, done: float, total: float | None, unit: str) -> None:
        if doing == "extracting" and done >= n_shards:
            raise Stopped

    return report


def extract_some(out: Path, n_shards: int, **changes: Any) -> None:
    """Extract so many shards of the world, then stop: the pass is there and not complete."""
    try:
        extract(out, report=stopping_after(n_shards), **changes)
    except Stopped:
        return
    raise AssertionError("the extraction was not stopped")


def hashes(root: Path, *homes: str) -> dict[str, str]:
    """Return the SHA-256 of every file of a store, or of those below some of its directories."""
    files = (path for home in homes or (".",) for path in (root / home).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def truth(root: Path) -> dict[str, str]:
    """Return the SHA-256 of everything that a recipe determines: arrays, firings, kit; not of what was left half."""
    found = hashes(root, "arrays", "firings", "kit")
    return {name: digest for name, digest in found.items() if not name.endswith(PARTIAL_SUFFIX)}


def index_content(root: Path) -> dict[str, list[str]]:
    """Return every table's rows, ordered and spelled out; when the store was made is left out."""
    with Store(root) as store:
        return {table: list(_rows(store, table)) for table in TABLES}


def _rows(store: Store, table: str) -> Iterator[str]:
    columns = f"* EXCLUDE (created) FROM {table}" if table == "store" else f"* FROM {table}"
    yield from map(repr, store.sql(f"SELECT {columns} ORDER BY ALL").arrow().to_pylist())


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a sealed document and seal it again, as a program of another release or machine would have written it."""
    body = read_sealed(path)
    change(body)
    write_sealed(path, body)


def same_bits(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Return whether arrays agree in type, shape and every bit: NaNs and signs of zero included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()
