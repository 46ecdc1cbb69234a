"""The highest logits of rows, and the sum that makes probabilities of them, while the vocabulary goes by in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Likeliest", "TopTokens"]

FEW = 4  # times k candidates of a row, from which on they are first thinned out

Logits = npt.NDArray[np.float32]
Places = npt.NDArray[np.intp]


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of some rows: token_ids int32 and logprobs float32, (row, k), falling."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]


class Likeliest:
    """The k highest logits of each row so far, ties to the lower token, and the log of the sum of all exponentials.

    What is no number counts as lower than any number, and makes the row's log-probabilities no numbers either.
    """

    def __init__(self, n_rows: int, k: int) -> None:
        self._k = k
        self._logits = np.empty((n_rows, 0), dtype=np.float32)
        self._token_ids = np.empty((n_rows, 0), dtype=np.int32)
        self._log_sum = np.full(n_rows, -np.inf, dtype=np.float64)

    def add(self, first: int, logits: Logits) -> None:
        """Take in the logits (row, token) of tokens from `first` on, which come in rising order; overwrites them."""
        rows, columns = self._candidates(logits)
        n_rows, n_held = self._logits.shape
        self._keep(
            np.concatenate([np.repeat(np.arange(n_rows), n_held), rows]),
            np.concatenate([self._logits.reshape(-1), logits[rows, columns]]),
            np.concatenate([self._token_ids.reshape(-1), (columns + first).astype(np.int32)]),
            min(self._k, n_held + logits.shape[1]),
        )
        with np.errstate(invalid="ignore"):  # a row that is no number says so in its log-probabilities
            self._log_sum = np.logaddexp(self._log_sum, _log_sum_exp(logits))

    def top(self) -> TopTokens:
        """Return the k likeliest of all tokens that were taken in."""
        return TopTokens(self._token_ids, (self._logits - self._log_sum[:, None]).astype(np.float32))

    def _candidates(self, logits: Logits) -> tuple[Places, Places]:
        """Return rows and columns of all that may be among the k highest, of some that are not, by row."""
        n_rows, n_tokens = logits.shape
        full = self._logits.shape[1] == self._k
        bound = self._logits[:, -1:] if full else np.full((n_rows, 1), np.nan, np.float32)
        maybe = ~(logits <= bound)  # negated, because NaN is neither
        if self._k < n_tokens and np.count_nonzero(maybe) > FEW * self._k * n_rows:
            maybe &= ~(logits < -np.partition(-logits, self._k - 1, axis=1)[:, self._k - 1 : self._k])
        rows, columns = np.nonzero(maybe)
        return rows, columns

    def _keep(self, rows: Places, logits: Logits, token_ids: npt.NDArray[np.int32], n_kept: int) -> None:
        """Keep the highest of each row, falling; every row has as many at least."""
        n_rows = len(self._log_sum)
        order = np.lexsort((token_ids, -logits, rows))
        starts = np.searchsorted(rows[order], np.arange(n_rows))
        chosen = order[starts[:, None] + np.arange(n_kept)]
        self._logits, self._token_ids = logits[chosen], token_ids[chosen]


def _log_sum_exp(logits: Logits) -> npt.NDArray[np.float64]:
    """Return the log of each row's sum of exponentials; overwrites the logits."""
    highest = logits.max(axis=1, keepdims=True)
    np.exp(np.subtract(logits, highest, out=logits), out=logits)
    return np.asarray(np.log(logits.sum(axis=1, dtype=np.float64)) + highest[:, 0])
