"""The logit lens offline: final norm, unembedding and soft cap from the kit, without torch.

The unembedding is read and widened to float32 a block of the vocabulary at a time: at Gemma's size it is 2.4 GB whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from actstore.errors import InvalidInput, UnsupportedFormat, explain

if TYPE_CHECKING:
    import zarr

__all__ = ["TopTokens", "Unembed"]

TOKENS_PER_BLOCK = 8192
ROWS_PER_BLOCK = 1024
NUMBERS_PER_BLOCK = 1 << 22
PAIRS_PER_PRODUCT = 8  # products that are not asked for, to one that is, below which a product of matrices is faster


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of some rows: token_ids int32 and logprobs float32, (row, k), falling."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


class Unembed:
    """Reads residual rows as logits; made from a store's kit piece `unembedding`."""

    def __init__(self, piece: zarr.Group) -> None:
        """Take the piece; its weight stays on the disk.

        Raises UnsupportedFormat for a norm that this release does not know.
        """
        self._weight: Any = piece["weight"]
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
        """Go over the vocabulary once, keeping the best k so far and the running log of the sum of exponentials."""
        n_rows = len(rows)
        best = np.full((n_rows, 0), -np.inf, dtype=np.float32)
        ids = np.empty((n_rows, 0), dtype=np.int32)
        log_sum = np.full(n_rows, -np.inf, dtype=np.float64)
        for first, logits in self.logits(rows):
            log_sum = np.logaddexp(log_sum, _log_sum_exp(logits))
            token_ids = np.broadcast_to(np.arange(first, first + logits.shape[1], dtype=np.int32), logits.shape)
            best, ids = _best(np.hstack([best, logits]), np.hstack([ids, token_ids]), k)
        return TopTokens(ids, (best - log_sum[:, None]).astype(np.float32))

    def logits(self, rows: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield (first token id, logits float32 (row, token)) over blocks of the vocabulary, soft cap applied.

        Raises InvalidInput for rows that are not d_model wide.
        """
        if rows.ndim != 2 or rows.shape[1] != self.d_model:
            raise InvalidInput(
                explain(f"The rows are {rows.shape}", accepted=f"(row, {self.d_model}): the residual stream")
            )
        normed = self._norm(rows.astype(np.float32))
        for first in range(0, self.vocabulary_size, TOKENS_PER_BLOCK):
            block = np.asarray(self._weight[first : first + TOKENS_PER_BLOCK]).astype(np.float32)
            yield first, self.capped(normed @ block.T)

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
        return self.capped(logits)

    def capped(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return logits after the model's soft cap, where it has one."""
        if self._softcap is None:
            return logits
        return np.asarray(np.tanh(logits / self._softcap, dtype=np.float32) * np.float32(self._softcap))

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
        firsts = range(0, self.vocabulary_size, TOKENS_PER_BLOCK)
        blocks = (np.asarray(self._weight[first : first + TOKENS_PER_BLOCK]).astype(np.float64) for first in firsts)
        return np.asarray(sum(block.sum(axis=0) for block in blocks) / self.vocabulary_size)

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


def _log_sum_exp(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    highest = logits.max(axis=1)
    total = np.log(np.exp(logits - highest[:, None], dtype=np.float32).sum(axis=1, dtype=np.float64))
    return np.asarray(total + highest, dtype=np.float64)


def _best(
    logits: npt.NDArray[np.float32], ids: npt.NDArray[np.int32], k: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Return the k highest of each row, falling; ties by token id."""
    if logits.shape[1] > k:
        chosen = np.argpartition(-logits, k - 1, axis=1)[:, :k]
        logits, ids = np.take_along_axis(logits, chosen, 1), np.take_along_axis(ids, chosen, 1)
    order = np.lexsort((ids, -logits), axis=1)
    return np.take_along_axis(logits, order, 1), np.take_along_axis(ids, order, 1)


def _optional_float(value: Any) -> float | None:
    return None if value is None else float(value)
