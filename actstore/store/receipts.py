"""Reading the receipts of a pass: loose ones, and those of its sealed manifests (docs/format.md §7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .files import manifest_file, receipt_file
from .layout import Layout
from .location import Location

__all__ = ["load_receipts"]


def load_receipts(location: Location, layout: Layout, pass_id: str) -> dict[int, Mapping[str, Any]]:
    """Return the receipts of a pass by shard, in order; raises CorruptStore where one was changed."""
    found: dict[int, Mapping[str, Any]] = {}
    # Loose receipts first: one that is sealed and removed in between is then found in the manifest.
    for name in location.names(f"passes/{pass_id}/receipts"):
        if name.endswith(".json"):
            try:
                found[int(name[:-5])] = location.read_sealed(receipt_file(pass_id, int(name[:-5])))
            except FileNotFoundError:
                continue
    for segment in layout.segments:
        name = manifest_file(pass_id, segment.segment)
        if location.exists(name):
            sealed = location.read_sealed(name)["receipts"]
            found.update({int(shard): receipt for shard, receipt in sealed.items()})
    return dict(sorted(found.items()))
