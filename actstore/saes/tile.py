"""One tile of rows on its way through coders: what they read, made ready once, and what they say of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .compaction import Firings

if TYPE_CHECKING:
    import torch

__all__ = ["EncodedTile", "TileRows", "tile_of"]


@dataclass(frozen=True, eq=False)
class TileRows:
    """Rows of a tile as every coder computes with them; several coders of a site share them.

    exact float32 (row, width), 0 on a row that holds NaN or infinity: no such number may reach a product; finite bool
    (row): all other rows; is_narrow: bfloat16 would hold every number.
    """

    exact: torch.Tensor
    finite: torch.Tensor
    is_narrow: bool

    @classmethod
    def of(cls, rows: TileRows | torch.Tensor) -> TileRows:
        """Return rows (row, width) of any float dtype made ready; what is ready comes back as it is."""
        import torch

        if isinstance(rows, TileRows):
            return rows
        finite = torch.isfinite(rows).all(dim=-1)
        return cls(torch.where(finite[..., None], rows.float(), 0.0), finite, rows.dtype == torch.bfloat16)


@dataclass(frozen=True, eq=False)
class EncodedTile:
    """What an SAE says about one tile of rows; tensors on the encoder's device.

    counts int64 (row): listed firings of each row; features int32 (firing): row after row, increasing in each;
    activations float32 (firing), all > 0; reconstruction float32 (row, 3): l0, ‖y‖, ‖y − x_hat‖ of the
    row y that is reconstructed, which is the row itself or, of a transcoder, its target; the last is NaN where
    layers below write y too.
    A tile that was encoded into a number of slots has so many features and activations: the first `counts.sum()` are
    its firings, unless n_found, int64 (), all that fired, listed or not, is more than the slots. Then nothing holds,
    and it has to be encoded again, without.
    A row that holds NaN or infinity has no firings, and NaN for its reconstruction; so both norms of such a target.
    """

    counts: torch.Tensor
    features: torch.Tensor
    activations: torch.Tensor
    reconstruction: torch.Tensor
    n_found: torch.Tensor

    def first(self, n_firings: int) -> EncodedTile:
        """Return the tile without what lies behind its firings."""
        return replace(self, features=self.features[:n_firings], activations=self.activations[:n_firings])


def tile_of(found: Firings, wanted: torch.Tensor, reconstruction: torch.Tensor) -> EncodedTile:
    """Return the tile of what fires on its rows, of which bool (row) `wanted` are listed."""
    kept = found.of(wanted)
    return EncodedTile(kept.counts, kept.features.int(), kept.activations, reconstruction, found.counts.sum())
