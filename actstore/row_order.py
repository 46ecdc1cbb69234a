"""The order of rows for training: which shards each rank and worker reads, and how they are shuffled. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, explain

__all__ = ["ROWS", "RowOrder", "Stream", "permutation"]

SHARDS, ROWS = 0, 1  # what a permutation is of: no two share their random numbers


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """All that the order of rows depends on, the store's own shards apart.

    Raises InvalidInput for numbers that cannot be.
    """

    batch_rows: int
    seed: int
    buffer_shards: int
    plain_only: bool
    drop_last: bool
    rank: int
    world_size: int
    n_streams: int  # one per worker

    def __post_init__(self) -> None:
        least = {"batch_rows": 1, "buffer_shards": 1, "world_size": 1, "n_streams": 1, "seed": 0, "rank": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise InvalidInput(explain(f"{name} is {getattr(self, name)}", accepted=f"{lowest} or more"))
        if self.rank >= self.world_size:
            raise InvalidInput(explain(f"rank is {self.rank} of {self.world_size}", accepted="below world_size"))

    def streams(self, shards: Sequence[int], epoch: int) -> list[list[int]]:
        """Return the shards of each of this rank's streams in an epoch, shuffled; ranks and streams share none."""
        order = permutation(len(shards), self.seed, epoch, SHARDS)
        mine = [shards[place] for place in order][self.rank :: self.world_size]
        return [mine[stream :: self.n_streams] for stream in range(self.n_streams)]

    def n_batches(self, n_rows: int) -> int:
        """Return how many batches so many rows of a stream make."""
        return n_rows // self.batch_rows if self.drop_last else -(-n_rows // self.batch_rows)


@dataclass(frozen=True)
class Stream:
    """What one worker gives out in an epoch: groups of shards, and where in the stream each begins."""

    groups: tuple[tuple[int, ...], ...]
    bounds: npt.NDArray[np.int64]  # int64 (group + 1)

    @classmethod
    def of(cls, shards: Sequence[int], n_rows: Mapping[int, int], order: RowOrder) -> Stream:
        """Return the stream of these shards; n_rows: wanted rows of each."""
        size = order.buffer_shards
        groups = tuple(tuple(shards[place : place + size]) for place in range(0, len(shards), size))
        lengths = [sum(n_rows[shard] for shard in group) for group in groups]
        return cls(groups, np.cumsum([0, *lengths], dtype=np.int64))

    def groups_of(self, first: int, n_rows: int) -> Iterator[tuple[tuple[int, ...], slice]]:
        """Yield the groups that hold so many rows of the stream from `first` on, and which of their rows these are."""
        end = min(first + n_rows, int(self.bounds[-1]))
        place = int(np.searchsorted(self.bounds, first, side="right")) - 1
        while first < end:
            begin, after = int(self.bounds[place]), min(end, int(self.bounds[place + 1]))
            if first < after:
                yield self.groups[place], slice(first - begin, after - begin)
            first, place = after, place + 1


def permutation(length: int, *seeds: int) -> npt.NDArray[np.intp]:
    """Return an order of `length` things: raw bits of PCG64, sorted, so that no numpy release changes it."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(length), kind="stable")
