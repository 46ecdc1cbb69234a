"""The logit lens offline: final norm, unembedding and soft cap from the kit, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from actstore.errors import InvalidInput, UnsupportedFormat, explain

from .likeliest import Likeliest, TopTokens
from .widened import WidenedWeight

if TYPE_CHECKING:
    import zarr

__all__ = ["TopTokens", "Unembed"]

ROWS_PER_BLOCK = 2048
NUMBERS_PER_BLOCK = 1 << 22
PAIRS_PER_PRODUCT = 8  # products that are not asked for, to one that is, below which a product of matrices is faster


class Unembed:
    """Reads residual rows as logits; made from a store's kit piece `unembedding`."""

    def __init__(self, piece: zarr.Group) -> None:
        """Take the piece; its weight stays on the disk.

        Raises UnsupportedFormat for a norm that this release does not know.
        """
        self._weight: Any = piece["weight"]
        self._widened = WidenedWeight(self._weight)
        self._gain = np.asarray(piece["gain"], dtype=np.float32)
        self._softcap: float | None = _optional_float(piece.attrs["softcap"])
        self._epsilon = float(str(piece.attrs["norm_epsilon"]))
        self._bias: Any = np.asarray(piece["bias"], dtype=np.float32) if "bias" in piece else np.float32(0)
        self._centred = piece.attrs["norm"] == "layer"
        if piece.attrs["norm"] not in ("rms", "layer"):
            raise UnsupportedFormat(explain(f"The kit's final norm is {piece.attrs['norm']!r}", accepted="rms, layer"))

    @property
    def d_model(self) -> int:
        """Width of the rows that it reads."""
        return len(self._gain)

    @property
    def vocabulary_size(self) -> int:
        return int(self._weight.shape[0])

    def top(self, rows: npt.NDArray[Any], k: int) -> TopTokens:
        """Return the k likeliest tokens of residual rows (row, d_model) of any float dtype.

        logprob = log_softmax(cap · tanh(U · norm(x) / cap)), the cap where the model has one.
        Raises InvalidInput for rows of another width, or a k below 1 or above the vocabulary.
        """
        if not 1 <= k <= self.vocabulary_size:
            raise InvalidInput(explain(f"k is {k}", accepted=f"1 to {self.vocabulary_size}, the vocabulary's size"))
        parts = [self._top(rows[start : start + ROWS_PER_BLOCK], k) for start in range(0, len(rows), ROWS_PER_BLOCK)]
        empty = TopTokens(np.empty((0, k), np.int32), np.empty((0, k), np.float32))
        return TopTokens(
            np.concatenate([empty.token_ids, *(part.token_ids for part in parts)]),
            np.concatenate([empty.logprobs, *(part.logprobs for part in parts)]),
        )

    def _top(self, rows: npt.NDArray[Any], k: int) -> TopTokens:
        """Go over the vocabulary once."""
        likeliest = Likeliest(len(rows), k)
        for first, logits in self._logits(rows):
            likeliest.add(first, logits)
        return likeliest.top()

    def _logits(self, rows: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield (first token id, logits float32 (row, token)) by blocks of the vocabulary, all in one place of memory.

        Raises InvalidInput for rows that are not d_model wide.
        """
        if rows.ndim != 2 or rows.shape[1] != self.d_model:
            raise InvalidInput(
                explain(f"The rows are {rows.shape}", accepted=f"(row, {self.d_model}): the residual stream")
            )
        normed = self._norm(rows.astype(np.float32))
        place = np.empty(0, np.float32)
        for first, block in self._widened:
            size = len(normed) * len(block)
            place = place if len(place) >= size else np.empty(size, np.float32)
            logits = place[:size].reshape(len(normed), len(block))
            yield first, self._capped(np.matmul(normed, block.T, out=logits))

    def logits_of(
        self,
        rows: npt.NDArray[Any],
        weights: npt.NDArray[np.float32],
        of_row: npt.NDArray[np.intp],
        of_weight: npt.NDArray[np.intp],
    ) -> npt.NDArray[np.float32]:
        """Return logits float32 (pair), soft cap applied, of pairs of a residual row and a row of the unembedding."""
        normed = self._norm(rows.astype(np.float32))
        if len(rows) * len(weights) <= PAIRS_PER_PRODUCT * len(of_row):  # lists that are alike: one product of matrices
            logits = (normed @ weights.T)[of_row, of_weight]
        else:
            step = max(1, NUMBERS_PER_BLOCK // self.d_model)
            parts = [slice(first, first + step) for first in range(0, len(of_row), step)]
            pairs = [np.einsum("pd,pd->p", normed[of_row[part]], weights[of_weight[part]]) for part in parts]
            logits = np.concatenate([np.empty(0, np.float32), *pairs])
        return self._capped(logits)

    def _capped(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return logits after the model's soft cap, where it has one; overwrites them."""
        if self._softcap is not None:
            np.divide(logits, np.float32(self._softcap), out=logits)
            np.tanh(logits, out=logits)
            np.multiply(logits, np.float32(self._softcap), out=logits)
        return logits

    def before_cap(self, rows: npt.NDArray[Any], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return each row's product (row) with a direction (row, d_model) of the unembedding, as the model norms it."""
        normed = self._norm(rows.astype(np.float32)).astype(np.float64)
        return np.asarray(np.einsum("rd,rd->r", normed, weights))

    def pulled_back(
        self, rows: npt.NDArray[Any], weights: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return what a direction of the unembedding reads from the stream: (row, d_model), and a constant (row).

        `before_cap(x, w)` is x · direction + constant where the norm's scale is frozen at the row's own; linear in x,
        so that each summand of x has its share. For layer norms x is centred: so is the direction instead.
        """
        exact = rows.astype(np.float64)
        if self._centred:
            exact = exact - exact.mean(axis=1, keepdims=True)
        scale = 1 / np.sqrt(np.mean(exact * exact, axis=1, keepdims=True) + self._epsilon)
        read = weights * self._gain * scale
        constant = np.sum(weights * self._bias, axis=1)
        return (read - read.mean(axis=1, keepdims=True) if self._centred else read), constant

    @cached_property
    def mean_row(self) -> npt.NDArray[np.float64]:
        """The mean of the unembedding over the vocabulary: float64 (d_model); reads all of it once."""
        total = sum(block.sum(axis=0, dtype=np.float64) for _, block in self._widened)
        return np.asarray(total / self.vocabulary_size)

    @property
    def has_norm_bias(self) -> bool:
        """Whether the final norm adds something of its own."""
        return isinstance(self._bias, np.ndarray)

    def _norm(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """RMS or layer norm with the effective gain, rounded to the weight's dtype as the model rounds it."""
        if self._centred:
            rows = rows - rows.mean(axis=1, keepdims=True)
        scale = 1 / np.sqrt(np.mean(rows * rows, axis=1, keepdims=True) + np.float32(self._epsilon))
        normed = rows * scale * self._gain + self._bias
        if self._weight.dtype == np.dtype(ml_dtypes.bfloat16):
            normed = normed.astype(ml_dtypes.bfloat16)
        return np.asarray(normed, dtype=np.float32)


def _optional_float(value: Any) -> float | None:
    return None if value is None else float(value)
