"""What some architectures do to a tile of rows besides the product: normalise it, keep only its largest features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .coder import Normalisation

if TYPE_CHECKING:
    import torch

__all__ = ["RowScale", "keep_largest", "scale_of"]

LAYER_NORM_EPSILON = 1e-5  # added to the standard deviation on the way in, and not on the way out


@dataclass(frozen=True, eq=False)
class RowScale:
    """How each row is normalised and how that is undone; all float32 (row, 1)."""

    mean: torch.Tensor
    divisor: torch.Tensor
    factor: torch.Tensor  # on the way out

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return normalised rows."""
        return (rows - self.mean) / self.divisor

    def undo(self, reconstruction: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of normalised rows in the units of the rows."""
        return reconstruction * self.factor + self.mean


def scale_of(rows: torch.Tensor, normalisation: Normalisation) -> RowScale | None:
    """Return how float32 rows (row, d_in) are normalised, or None where they are taken as they are."""
    import torch

    if normalisation is Normalisation.NONE:
        return None
    if normalisation is Normalisation.CENTRED:
        mean = rows.mean(dim=1, keepdim=True)
        return RowScale(mean, torch.ones_like(mean), torch.ones_like(mean))
    if normalisation is Normalisation.LAYER_NORM:
        deviation, mean = torch.std_mean(rows, dim=1, keepdim=True)
        return RowScale(mean, deviation + LAYER_NORM_EPSILON, deviation)
    length = rows.norm(dim=1, keepdim=True) / rows.shape[1] ** 0.5
    smallest = torch.finfo(rows.dtype).tiny  # a row of zeros stays one
    return RowScale(torch.zeros_like(length), length.clamp(min=smallest), length)


def keep_largest(features: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest positive features of each row, in place: (row, d_sae). Of equal ones the lower index wins."""
    import torch

    largest = features.topk(k, dim=1).values
    lowest = largest[:, -1:]
    room = k - (largest > lowest).sum(dim=1, keepdim=True)
    tied = features == lowest
    kept = tied.cumsum(dim=1, dtype=torch.int32).le(room).logical_and_(tied).logical_or_(features > lowest)
    return features.masked_fill_(kept.logical_not_(), 0.0)
