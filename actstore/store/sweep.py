"""Removing what no receipt names: unfinished files, dead claims, shards of a run that died (docs/format.md §9)."""

from __future__ import annotations

from pathlib import Path

from actstore.errors import CorruptStore, explain

from .claims import exclusive, no_claims
from .sharing import forget_unused
from .verify import verify_store
from .writer import StoreWriter

__all__ = ["sweep_store"]


def sweep_store(root: Path) -> list[str]:
    """Remove orphans of a local store and return their names.

    Raises StoreBusy while somebody extracts into it, CorruptStore where anything is damaged: a manifest that cannot be
    read would make orphans of all that it names.
    """
    with exclusive(root), no_claims(root):
        StoreWriter.open(root).repair_metadata()
        found = verify_store(root)
        if found.faults:
            raise CorruptStore(
                explain(
                    f"{root} is damaged ({found.faults[0]}), and what names a file could be lost: nothing was removed",
                    next_step="run `actstore verify`, mend or drop what it names, then run gc again",
                )
            )
        orphans = [name for name in found.orphans if ":" not in name]
        for name in orphans:
            (root / name).unlink()
        forget_unused()
    return orphans
