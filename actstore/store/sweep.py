"""Removing what no receipt names: unfinished files, dead claims, shards of a run that died (docs/format.md §9)."""

from __future__ import annotations

import shutil
from pathlib import Path

from actstore.errors import StoreBusy, explain

from .claims import claim, exclusive
from .verify import verify_store

__all__ = ["sweep_store"]


def sweep_store(root: Path) -> list[str]:
    """Remove orphans of a local store and return their names.

    Raises StoreBusy while somebody extracts into it; faults are left alone, for `actstore verify` to name.
    """
    with exclusive(root):
        for path in sorted((root / "claims").glob("*/*.json")):
            taken = claim(path)
            if taken is None:
                raise StoreBusy(
                    explain(
                        f"{root} is being extracted into (claim {path.relative_to(root)})",
                        next_step="wait until the extraction has ended, then run gc again",
                    )
                )
            path.unlink()
        shutil.rmtree(root / "claims", ignore_errors=True)
        orphans = [name for name in verify_store(root).orphans if ":" not in name]
        for name in orphans:
            (root / name).unlink()
    return orphans
