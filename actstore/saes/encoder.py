"""Encode rows with a sparse coder: dense on the device, tile by tile, sparse at once.

All sums are float32 with TF32 off. A product of matrices may be summed in another order for another number of rows, so
the same row gives the same bits only in tiles of one size: the caller pads every tile to the recipe's `tile_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.errors import InvalidInput, explain
from actstore.recipe import SaeIdentity

from .coder import SparseCoder
from .rules import RowScale, keep_largest, scale_of

if TYPE_CHECKING:
    import torch

__all__ = ["EncodedTile", "SaeEncoder", "round_mantissa"]

MANTISSA_BITS = 23  # of float32


@dataclass(frozen=True, eq=False)
class EncodedTile:
    """What an SAE says about one tile of rows; tensors on the encoder's device.

    counts int64 (row): listed firings of each row; features int32 (firing): row after row, increasing in each;
    activations float32 (firing), all > 0; reconstruction float32 (row, 3): l0, ‖x‖, ‖x − x_hat‖.
    A row that holds NaN or infinity has no firings, and NaN for its reconstruction.
    """

    counts: torch.Tensor
    features: torch.Tensor
    activations: torch.Tensor
    reconstruction: torch.Tensor


class SaeEncoder:
    """A sparse coder's weights on a device, ready to encode tiles of rows."""

    def __init__(self, coder: SparseCoder, device: str | torch.device) -> None:
        """Copy the weights to the device as float32, and switch TF32 off for the whole process."""
        import torch

        torch.backends.cuda.matmul.allow_tf32 = False
        self.coder = coder
        self.device = torch.device(device)
        self._w_enc, self._w_dec, self._b_enc, self._b_dec, self._threshold = (
            torch.tensor(array, device=self.device)
            for array in (coder.w_enc, coder.w_dec, coder.b_enc, coder.b_dec, coder.threshold)
        )

    @property
    def identity(self) -> SaeIdentity:
        """Which sparse coder this is."""
        return self.coder.identity

    def encode(self, rows: torch.Tensor, listed: torch.Tensor | None = None) -> EncodedTile:
        """Encode one tile: rows (row, d_in) of any float dtype on the device.

        listed bool (row): the rows whose firings are wanted, by default all. Special rows are not listed but have
        their reconstruction; filler may hold anything. Deterministic for a given number of rows.
        Raises InvalidInput for rows of another width.
        """
        import torch

        self._check(rows)
        with torch.no_grad():
            finite = torch.isfinite(rows).all(dim=1)
            exact = torch.where(finite[:, None], rows.float(), 0.0)  # NaN in one row must not reach the product
            scale = scale_of(exact, self.coder.normalisation)
            features = self._features(exact if scale is None else scale.apply(exact))
            fires = features > 0
            reconstruction = self._reconstruction(exact, features, fires, scale)
            reconstruction.masked_fill_(~finite[:, None], torch.nan)
            wanted = finite if listed is None else finite & listed
            row, feature = fires.logical_and_(wanted[:, None]).nonzero(as_tuple=True)
            return EncodedTile(
                counts=torch.bincount(row, minlength=len(rows)),
                features=feature.int(),
                activations=features[row, feature],
                reconstruction=reconstruction,
            )

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of dense features: float32 (row, d_sae) → (row, d_in), in normalised units."""
        import torch

        return torch.addmm(self._b_dec, features, self._w_dec)

    def _features(self, rows: torch.Tensor) -> torch.Tensor:
        import torch

        centred = rows - self._b_dec if self.coder.subtracts_b_dec else rows
        before = torch.addmm(self._b_enc, centred, self._w_enc)
        features = before.masked_fill_(before <= self._threshold, 0.0)
        return features if self.coder.k is None else keep_largest(features, self.coder.k)

    def _reconstruction(
        self, rows: torch.Tensor, features: torch.Tensor, fires: torch.Tensor, scale: RowScale | None
    ) -> torch.Tensor:
        import torch

        l0 = fires.sum(dim=1, dtype=torch.int32).float()  # int64, the default, takes twice as long
        decoded = self.decode(features)
        decoded = decoded if scale is None else scale.undo(decoded)
        return torch.stack([l0, rows.norm(dim=1), (rows - decoded).norm(dim=1)], dim=1)

    def _check(self, rows: torch.Tensor) -> None:
        if rows.ndim != 2 or rows.shape[1] != self.coder.d_in:
            raise InvalidInput(
                explain(
                    f"The SAE {self.coder.identity.sae} cannot encode rows of shape {tuple(rows.shape)}",
                    accepted=f"(row, {self.coder.d_in})",
                )
            )


def round_mantissa(activations: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Return activations with `bits` mantissa bits kept, 1 to 23, rounded to the nearest, ties to even.

    float32 in and out. 23 keeps all. What is finite stays finite (the largest numbers are cut instead of rounded up
    to infinity), what is positive stays positive; infinities and NaN pass. Raises InvalidInput for other `bits`.
    """
    if not 1 <= bits <= MANTISSA_BITS:
        raise InvalidInput(explain(f"{bits} mantissa bits cannot be kept", accepted=f"1 to {MANTISSA_BITS}"))
    dropped = MANTISSA_BITS - bits
    if dropped == 0 or not activations.size:
        return activations
    codes = np.ascontiguousarray(activations, dtype=np.float32).view(np.uint32)
    kept = np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)
    half_below = np.uint32((1 << (dropped - 1)) - 1)
    odd = (codes >> np.uint32(dropped)) & np.uint32(1)
    rounded = ((codes + half_below + odd) & kept).view(np.float32)
    rounded = np.where(np.isfinite(rounded), rounded, (codes & kept).view(np.float32))
    vanished = (rounded == 0) & (activations != 0)
    rounded = np.where(vanished, np.copysign(np.uint32(1 << dropped).view(np.float32), activations), rounded)
    return np.where(np.isfinite(activations), rounded, activations)
