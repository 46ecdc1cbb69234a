"""The logit lens offline: final norm, unembedding and soft cap from the kit, without torch.

The unembedding is read and widened to float32 a block of the vocabulary at a time: at Gemma's size it is 2.4 GB whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
            logits = normed @ block.T
            if self._softcap is not None:
                logits = np.tanh(logits / self._softcap, dtype=np.float32) * np.float32(self._softcap)
            yield first, logits

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
