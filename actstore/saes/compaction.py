"""From dense features to the list of those that fire, on the device: waiting for its length, or never waiting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Firings", "compact"]


@dataclass(frozen=True, eq=False)
class Firings:
    """Firings of a tile: row after row, features increasing in each.

    counts int64 (row); rows and features int64 (place); activations (place). Where the list was made for a number of
    places, its length is that number: behind the last firing the row is the tile's number of rows and the rest is
    anything, and where the counts add up to more than the places, only the first firings are there.
    """

    counts: torch.Tensor
    rows: torch.Tensor
    features: torch.Tensor
    activations: torch.Tensor
    has_places: bool

    def of(self, wanted: torch.Tensor) -> Firings:
        """Return the firings of some rows: bool (row)."""
        import torch

        keep = torch.cat([wanted, wanted.new_zeros(1)])[self.rows]
        place = _places(keep, len(keep) if self.has_places else None)
        counts = self.counts.masked_fill(~wanted, 0)
        rows = self.rows[place]
        if self.has_places:
            rows = rows.where(torch.arange(len(place), device=place.device) < counts.sum(), len(counts))
        return Firings(counts, rows, self.features[place], self.activations[place], self.has_places)

    def decoded(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the sum of each row's features, times their weights (feature, d_out): (row, d_out).

        In the order of the features, whatever the tile; in time that grows with the firings and not with the features.
        """
        import torch

        ends = self.counts.cumsum(dim=0).clamp(max=len(self.features))
        bounds = torch.cat([ends.new_zeros(1), ends])
        return torch.nn.functional.embedding_bag(
            self.features, weights, bounds, mode="sum", per_sample_weights=self.activations, include_last_offset=True
        )


def compact(features: torch.Tensor, fires: torch.Tensor, n_slots: int | None = None) -> Firings:
    """Return the list of what fires: features of any float dtype and fires bool, both (row, feature).

    How many fire is known on the device alone, and the host waits for it; with `n_slots` it does not: the list then has
    so many places, or one for every feature of every row.
    """
    import torch

    n_rows, n_features = fires.shape
    flat = fires.flatten()
    place = _places(flat, None if n_slots is None else min(n_slots, len(flat)))
    row, feature = place // n_features, place % n_features
    if n_slots is None:
        counts = torch.bincount(row, minlength=n_rows)
    else:
        counts = fires.sum(dim=1)
        row = row.where(torch.arange(len(place), device=place.device) < counts.sum(), n_rows)
    return Firings(counts, row, feature, features.flatten()[place], n_slots is not None)


def _places(chosen: torch.Tensor, size: int | None) -> torch.Tensor:
    """Return where a bool tensor is true; with `size` so many places, 0 behind the last."""
    import torch

    if size is None:
        return chosen.nonzero()[:, 0]
    return torch.nonzero_static(chosen, size=size, fill_value=0)[:, 0]
