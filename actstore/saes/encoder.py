"""Encode rows with a sparse coder: dense on the device, tile by tile, sparse at once.

All sums are float32 with TF32 off. A product of matrices may be summed in another order for another number of rows, so
the same row gives the same bits only in tiles of one size: the caller pads every tile to the recipe's `tile_rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.errors import InvalidInput, explain
from actstore.recipe import SaeIdentity

from .coder import SparseCoder
from .compaction import Firings, compact
from .rules import RowScale, keep_largest, scale_of
from .tile import EncodedTile, TileRows, tile_of

if TYPE_CHECKING:
    import torch

__all__ = ["SaeEncoder", "round_mantissa"]

MANTISSA_BITS = 23  # of float32


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
        self._w_skip = None if coder.w_skip is None else torch.tensor(coder.w_skip, device=self.device)

    @property
    def identity(self) -> SaeIdentity:
        """Which sparse coder this is."""
        return self.coder.identity

    def encode(
        self,
        rows: torch.Tensor | TileRows,
        listed: torch.Tensor | None = None,
        targets: torch.Tensor | TileRows | None = None,
        *,
        n_slots: int | None = None,
    ) -> EncodedTile:
        """Encode one tile: rows (row, d_in) of any float dtype on the device, or made ready for several coders.

        listed bool (row): the rows whose firings are wanted, by default all. Special rows are not listed but have
        their reconstruction; filler may hold anything. targets (row, d_out): what a transcoder reconstructs, and only
        a transcoder has any. n_slots: the firings that there is room for, so that nobody waits for their number (see
        `EncodedTile`); by default as many as there are. Deterministic for a given number of rows.
        Raises InvalidInput for rows or targets of another width, missing or too many.
        """
        import torch

        with torch.no_grad():
            read = TileRows.of(rows)
            target = read if targets is None else TileRows.of(targets)
            self._check(read, None if targets is None else target)
            scale = scale_of(read.exact, self.coder.normalisation)
            is_narrow = scale is None and read.is_narrow
            found = self._firings(read.exact if scale is None else scale.apply(read.exact), is_narrow, n_slots)
            reconstruction = self._reconstruction(read.exact, target.exact, found, scale)
            reconstruction.masked_fill_(~read.finite[:, None], torch.nan)
            reconstruction[:, 1:].masked_fill_(~target.finite[:, None], torch.nan)
            return tile_of(found, read.finite if listed is None else read.finite & listed, reconstruction)

    def features(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the dense features (row, d_sae) of rows (row, d_in), both float32, without NaN or infinity."""
        import torch

        with torch.no_grad():
            scale = scale_of(rows, self.coder.normalisation)
            return self._features(rows if scale is None else scale.apply(rows))

    def decode(self, features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction (row, d_out) of dense features (row, d_sae) and the rows (row, d_in), all float32.

        In normalised units; the rows themselves matter only where there is a skip.
        """
        import torch

        decoded = torch.addmm(self._b_dec, features, self._w_dec)
        return decoded if self._w_skip is None else decoded.addmm_(rows, self._w_skip)

    def _features(self, rows: torch.Tensor) -> torch.Tensor:
        """Return dense features (row, d_sae) of normalised rows, float32."""
        before = self._before(*self._centred(rows, False))
        features = before.masked_fill_(before <= self._threshold, 0.0)
        return features if self.coder.k is None else keep_largest(features, self.coder.k)

    def _firings(self, rows: torch.Tensor, is_narrow: bool, n_slots: int | None) -> Firings:
        """Return what fires on normalised rows, float32; is_narrow: bfloat16 would hold every number of them."""
        if self.coder.k is not None:
            features = self._features(rows)
            return compact(features, features > 0, n_slots)
        before = self._before(*self._centred(rows, is_narrow))
        return compact(before, before > self._threshold.clamp(min=0), n_slots)  # without a copy that holds the zeros

    def _centred(self, rows: torch.Tensor, is_narrow: bool) -> tuple[torch.Tensor, bool]:
        return (rows - self._b_dec, False) if self.coder.subtracts_b_dec else (rows, is_narrow)

    def _before(self, rows: torch.Tensor, is_narrow: bool) -> torch.Tensor:
        """Return what is compared with the threshold: rows @ w_enc + b_enc, (row, d_sae)."""
        import torch

        return torch.addmm(self._b_enc, rows, self._w_enc)

    def _reconstruction(
        self, rows: torch.Tensor, targets: torch.Tensor, found: Firings, scale: RowScale | None
    ) -> torch.Tensor:
        import torch

        l0 = found.counts.float()
        if self.coder.is_partial:
            return torch.stack([l0, targets.norm(dim=1), torch.full_like(l0, torch.nan)], dim=1)
        decoded = found.decoded(self._w_dec).add_(self._b_dec)
        decoded = decoded if self._w_skip is None else decoded.addmm_(rows, self._w_skip)
        decoded = decoded if scale is None else scale.undo(decoded)
        return torch.stack([l0, targets.norm(dim=1), (targets - decoded).norm(dim=1)], dim=1)

    def _check(self, rows: TileRows, targets: TileRows | None) -> None:
        coder, shape = self.coder, tuple(rows.exact.shape)
        if len(shape) != 2 or shape[1] != coder.d_in:
            raise InvalidInput(
                explain(
                    f"The SAE {coder.identity.sae} cannot encode rows of shape {shape}",
                    accepted=f"(row, {coder.d_in})",
                )
            )
        expected = (shape[0], coder.d_out) if coder.transcodes else None
        given = None if targets is None else tuple(targets.exact.shape)
        if given != expected:
            raise InvalidInput(
                explain(
                    f"The SAE {coder.identity.sae} was given {given} as the rows that it reconstructs",
                    accepted=f"{expected} of {coder.identity.write_site}" if expected else "none but what it reads",
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
