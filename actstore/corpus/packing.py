"""Packing: whole sequences into shards, in order (docs/format.md §3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from actstore.blocks import TOKEN_FIELDS, TokenShard

__all__ = ["ShardPacker"]

FILLER = -1


class ShardPacker:
    """Fills one shard after the other; a sequence that does not fit begins the next one.

    Holds the open shard and what one batch adds, whatever the size of the corpus.
    """

    def __init__(self, shard_rows: int, first_shard: int) -> None:
        self._shard_rows = shard_rows
        self._shard = first_shard
        self._used = 0
        self._open = _filler(1, shard_rows)[0]

    def place(self, n_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the first row of each sequence, int64 (sequence), in order after what was added so far."""
        assert n_tokens.max(initial=0) <= self._shard_rows
        ends = np.cumsum(n_tokens) + self._first_row + self._used
        rows = ends - n_tokens
        shift = begin = 0
        while begin < len(n_tokens):
            # Sequences that end in the shard in which `begin` starts; all after them move to the next shard.
            shard_end = (int(rows[begin] + shift) // self._shard_rows + 1) * self._shard_rows
            fitting = int(np.searchsorted(ends, shard_end - shift, side="right"))
            rows[begin:fitting] += shift
            begin = fitting
            if begin < len(n_tokens):
                shift = shard_end - int(rows[begin])
        return rows

    def add(self, rows: npt.NDArray[np.int64], values: npt.NDArray[np.int32]) -> tuple[TokenShard, ...]:
        """Write int32 (row, field) to the increasing `rows` of placed sequences; return the finished shards."""
        if len(rows) == 0:
            return ()
        end = int(rows[-1]) + 1 - self._first_row
        table = _filler(-(-end // self._shard_rows), self._shard_rows)
        table[0, : self._used] = self._open[: self._used]
        table.reshape(-1, len(TOKEN_FIELDS))[rows - self._first_row] = values
        n_finished, self._used = divmod(end, self._shard_rows)
        finished = tuple(TokenShard(self._shard + i, table[i]) for i in range(n_finished))
        self._shard += n_finished
        # A copy, or the open shard would keep the whole batch in memory.
        self._open = table[n_finished].copy() if self._used else _filler(1, self._shard_rows)[0]
        return finished

    def close(self) -> tuple[TokenShard, ...]:
        """Return the open shard with filler at its tail, or nothing where no row is in it."""
        return (TokenShard(self._shard, self._open),) if self._used else ()

    @property
    def _first_row(self) -> int:
        return self._shard * self._shard_rows


def _filler(n_shards: int, shard_rows: int) -> npt.NDArray[np.int32]:
    return np.full((n_shards, shard_rows, len(TOKEN_FIELDS)), FILLER, dtype=np.int32)
