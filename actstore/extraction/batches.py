"""The batches of a shard: a function of the layout alone, so that every run makes the same ones (docs/format.md §3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore.blocks import TokenShard

__all__ = ["Batch", "Sequences", "plan_batches", "sequences_of"]

SHORTEST, TENTHS = 9, 10  # tenths of a batch's longest sequence, where the batch is large enough without shorter ones
SMALL_BATCH = 8  # the part of `batch_tokens` that is large enough


@dataclass(frozen=True)
class Sequences:
    """The sequences of a shard: where each begins, counted from the shard's first row, and its length in tokens."""

    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Sequences that run together, padded on the right to the longest.

    token_ids int64 (sequence, position), padded with 0; attention_mask int64 alike; rows int64 (token): where each real
    token, in order of sequence and position, lies in the shard.
    """

    token_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    @property
    def n_sequences(self) -> int:
        return len(self.token_ids)

    def halves(self) -> tuple[Batch, Batch]:
        """Return the first and second half of the sequences, each as it was padded."""
        middle = self.n_sequences // 2
        n_first = int(self.attention_mask[:middle].sum())
        return (
            Batch(self.token_ids[:middle], self.attention_mask[:middle], self.rows[:n_first]),
            Batch(self.token_ids[middle:], self.attention_mask[middle:], self.rows[n_first:]),
        )


def sequences_of(shard: TokenShard) -> Sequences:
    """Return the sequences of a shard, in order."""
    seq = shard.column("seq")[: shard.n_rows]
    starts = np.flatnonzero(np.diff(seq, prepend=-2)).astype(np.int64)
    return Sequences(starts, np.diff(starts, append=shard.n_rows))


def plan_batches(shard: TokenShard, batch_tokens: int) -> list[Batch]:
    """Return a shard's batches: sequences by falling length, as many as fit `batch_tokens` padded tokens, at least one.

    A batch of an eighth of that is large enough to end where sequences become shorter than nine tenths of its longest:
    what padding costs is then less than what a smaller product does. Ties go by order in the shard, so the plan is
    determined by the layout.
    """
    sequences = sequences_of(shard)
    order = np.argsort(-sequences.lengths, kind="stable")
    falling = sequences.lengths[order]
    of_length = -TENTHS * falling  # rising, as a search wants it
    token_id = shard.column("token_id").astype(np.int64)
    batches, first = [], 0
    while first < len(order):
        longest = int(falling[first])
        most, least = max(1, batch_tokens // longest), -(-batch_tokens // (SMALL_BATCH * longest))
        alike = int(np.searchsorted(of_length, -SHORTEST * longest, side="right")) - first
        members = order[first : first + min(most, max(least, alike))]
        batches.append(_batch(token_id, sequences, members))
        first += len(members)
    return batches


def _batch(token_id: npt.NDArray[np.int64], sequences: Sequences, members: npt.NDArray[np.intp]) -> Batch:
    lengths, starts = sequences.lengths[members], sequences.starts[members]
    position = np.arange(int(lengths.max()))
    mask = position < lengths[:, None]
    rows = (starts[:, None] + position)[mask]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = token_id[rows]
    return Batch(ids, mask.astype(np.int64), rows)
