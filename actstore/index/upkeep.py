"""Upkeep of an index's files: proving every byte, leaving out what is damaged, and removing what nothing names."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from actstore.errors import ActstoreError, CorruptStore, UnsupportedFormat
from actstore.sealed import sha256_of_file

from .catalog import CATALOG_NAME, CURRENT, Catalog, Lock, Part, read_catalog

__all__ = ["find_orphans", "forget_damaged", "gc_index", "intact", "verify_index"]


def verify_index(directory: Path) -> list[str]:
    """Return what is wrong with the index, one line each; an empty list means that every byte was proved.

    `CURRENT`, the catalogs up to the current one and every part that it names are read whole. No index at all is no
    fault, nor is a later catalog: a build was killed before `CURRENT` named it.
    """
    try:
        catalog = read_catalog(directory)
    except ActstoreError as error:
        return [str(error)]
    if not catalog.number and _catalogs(directory):
        return [f"{CURRENT} is missing, but there are catalogs: run `actstore index`"]
    earlier = [path for path in _catalogs(directory) if _number(path) < catalog.number]
    faults = [_catalog_fault(path) for path in earlier] + [_part_fault(directory, part, True) for part in catalog.parts]
    return [fault for fault in faults if fault]


def intact(directory: Path, catalog: Catalog, *, prove: bool) -> Catalog:
    """Return the catalog with the parts whose files are there, as long as they were; with `prove`, byte for byte."""
    return replace(catalog, parts=tuple(part for part in catalog.parts if not _part_fault(directory, part, prove)))


def forget_damaged(directory: Path) -> None:
    """Remove catalogs that cannot be read; with the current one the whole index goes, to be made from the arrays.

    The caller holds `index.lock`, as for `build_index`.
    """
    try:
        current = read_catalog(directory, remake=True)
    except ActstoreError:
        damaged = list(directory.iterdir())
    else:
        damaged = [path for path in _catalogs(directory) if path.name != current.name and _catalog_fault(path)]
    for path in damaged:
        _remove(path)


def find_orphans(directory: Path, keep: int = 1) -> list[Path]:
    """Return the files that neither the current catalog nor the `keep` − 1 before it name, in order of name.

    Files of a build that runs are among them: only who holds `index.lock` knows that there is none, and may remove.
    None are returned where a catalog cannot be read: what it names is not known then, and `verify_index` says why.
    """
    try:
        return _unnamed(directory, keep)
    except (CorruptStore, UnsupportedFormat):
        return []


def _unnamed(directory: Path, keep: int) -> list[Path]:
    current = read_catalog(directory)
    earlier = sorted(
        (path for path in _catalogs(directory) if _number(path) < current.number), key=_number, reverse=True
    )
    named = {CURRENT, current.name, *(part.name for part in current.parts)}
    for path in earlier[: keep - 1]:
        catalog = Catalog.from_bytes(path.read_bytes(), path.name, remake=True)
        named |= {path.name, *(part.name for part in catalog.parts)}
    return sorted(path for path in directory.iterdir() if path.name not in named) if directory.is_dir() else []


def gc_index(directory: Path, keep: int = 1, *, lock: Lock | None = None) -> list[str]:
    """Remove what `find_orphans` finds, and return the names.

    The caller holds `index.lock`, as for `build_index`, so that no build runs: one that did would lose its parts and
    fail with StoreBusy. `lock` is what `build_index` takes as `lock`, entered while names are compared and removed.
    Raises CorruptStore where a catalog cannot be read: nothing is removed then.
    """
    with lock or nullcontext():
        orphans = _unnamed(directory, keep)
        for path in orphans:
            _remove(path)
    return [path.name for path in orphans]


def _catalog_fault(path: Path) -> str | None:
    try:
        Catalog.from_bytes(path.read_bytes(), path.name, remake=True)
    except ActstoreError as error:
        return str(error)
    return None


def _part_fault(directory: Path, part: Part, prove: bool) -> str | None:
    path = directory / part.name
    if not path.is_file():
        return f"{part.name} is missing"
    if (found := path.stat().st_size) != part.n_bytes:
        return f"{part.name} has {found} bytes instead of {part.n_bytes}"
    if prove and sha256_of_file(path) != part.sha256:
        return f"{part.name} was changed (its SHA-256 differs)"
    return None


def _catalogs(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("catalog-*.json") if CATALOG_NAME.fullmatch(path.name))


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("catalog-"))


def _remove(path: Path) -> None:
    # DuckDB's spill directory of a build that was killed is the only kind of directory here; a link's target stays.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
