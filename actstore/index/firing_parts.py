"""Firings, feature-major: the exact transpose of what the store holds row by row.

Every shard is transposed by itself, while it lies in the processor's cache, and held in the few bytes that a part
stores of it. A range of shards is then joined feature block by feature block and appended in the order (feature, row).
The range ends where the next shard would exceed the memory; many ranges of one SAE are joined later by `compaction`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.blocks import TOKEN_FIELDS, RowFirings, is_plain
from actstore.errors import CorruptStore, explain

from .ahead import ahead
from .catalog import Cover, Part
from .feature_parts import Block, Summary, block_firings, split_features, summarise_block
from .firing_blocks import Firings, append_firings, firing_types
from .parts import Workshop
from .source import Source
from .statistics import EXAMPLES, decoded

__all__ = ["ShardFirings", "firing_ranges", "half_codes", "join_shards", "read_shard", "write_firings"]

MAX_FIRINGS = 128_000_000
BYTES_PER_FIRING = 16  # what is held of one (4, and its share of `indptr`), the blocks on their way, DuckDB's share
BYTES_PER_EXAMPLE = 20
READERS = 2
MAX_SEGMENTS = 1 << 22  # (shard, feature) pairs of a block


@dataclass(frozen=True)
class ShardFirings:
    """One shard's firings ordered by (feature, row).

    indptr int32 (feature + 1); places (firing), the row counted from the shard's first, in the smallest unsigned type;
    stored (firing), codes of halves uint16 where these are exact, else float32; plain bool (row in use). `n_marked`
    firings are on rows that are not plain.
    """

    shard: int
    first_row: int
    indptr: npt.NDArray[np.int32]
    places: npt.NDArray[Any]
    stored: npt.NDArray[Any]
    plain: npt.NDArray[np.bool_]
    n_marked: int

    @property
    def n_firings(self) -> int:
        return len(self.places)

    @property
    def n_bytes(self) -> int:
        return self.indptr.nbytes + self.places.nbytes + self.stored.nbytes + self.plain.nbytes


def read_shard(source: Source, sae: str, n_features: int, shard: int) -> ShardFirings:
    """Return one shard's firings, transposed.

    Raises CorruptStore for a feature that the SAE does not have, and for firings on filler.
    """
    flags = source.matrix("corpus/tokens", shard)[:, TOKEN_FIELDS.index("flags")]
    firings = source.firings(sae, shard)
    if firings.n_rows < len(flags) or firings.indptr[len(flags)] != firings.indptr[-1]:
        raise CorruptStore(explain(f"Shard {shard} of {sae} has firings outside its {len(flags)} rows in use"))
    if len(firings.features) and firings.features.max() >= n_features:
        raise CorruptStore(explain(f"Shard {shard} of {sae} holds feature {firings.features.max()} of {n_features}"))
    indptr, places, stored = _transposed(firings, len(flags), n_features)
    plain = is_plain(flags)
    n_marked = int(np.diff(firings.indptr)[: len(flags)][~plain].sum())
    return ShardFirings(shard, shard * source.shard_rows, indptr, places, stored, plain, n_marked)


def _transposed(
    firings: RowFirings, n_rows: int, n_features: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any], npt.NDArray[Any]]:
    from scipy import sparse  # readers of the index never need it

    codes = half_codes(firings.activations)
    stored = firings.activations if codes is None else codes
    # int32 throughout: scipy would widen all indices to int64, at three times the cost.
    features, indptr = firings.features.astype(np.int32), firings.indptr[: n_rows + 1].astype(np.int32)
    by_feature = sparse.csr_array((stored, features, indptr), shape=(n_rows, n_features)).tocsc()
    places = by_feature.indices.astype(np.min_scalar_type(max(n_rows - 1, 0)))
    return by_feature.indptr.astype(np.int32, copy=False), places, by_feature.data


def half_codes(activations: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16] | None:
    """Return activations as the codes of IEEE halves: uint16 (firing), or None where one is not exactly a half."""
    with np.errstate(over="ignore"):
        halves = activations.astype(np.float16)
    return halves.view(np.uint16) if np.array_equal(halves.astype(np.float32), activations) else None


def firing_ranges(shards: Iterator[ShardFirings], max_firings: int, max_bytes: int) -> Iterator[list[ShardFirings]]:
    """Yield consecutive shards together while their firings fit; a shard that alone exceeds comes alone."""
    held: list[ShardFirings] = []
    n_firings = n_bytes = 0
    for shard in shards:
        n_firings, n_bytes = n_firings + shard.n_firings, n_bytes + shard.n_bytes
        if held and (n_firings > max_firings or n_bytes > max_bytes):
            yield held
            held, n_firings, n_bytes = [], shard.n_firings, shard.n_bytes
        held.append(shard)
    if held:
        yield held


def write_firings(
    workshop: Workshop, source: Source, sae: str, n_features: int, done: Mapping[int, str]
) -> Iterator[tuple[Part, list[Summary | Block]]]:
    """Write the firings of some shards as parts, one per range, and yield each; `done` has their receipts' digests.

    With a part that holds all of these shards comes what `features` says of them, with other parts nothing.
    """
    max_firings = min(MAX_FIRINGS, workshop.memory_bytes // BYTES_PER_FIRING)

    def read(shard: int) -> ShardFirings:
        workshop.go_on()
        return read_shard(source, sae, n_features, shard)

    shards = ahead(read, list(done), READERS)
    for held in firing_ranges(shards, max_firings, workshop.memory_bytes // 3):
        cover = Cover.of(done, [one.shard for one in held])
        made = _write_range(workshop, sae, _Range(held, n_features), cover, len(held) == len(done))
        held.clear()  # before the next range is read
        yield made


class _Range:
    """Shards that are held together, and how many of their firings each feature has."""

    def __init__(self, shards: Sequence[ShardFirings], n_features: int) -> None:
        self.shards = tuple(shards)
        self.half = all(one.stored.dtype == np.uint16 for one in shards)
        self.plain_rows = sum(int(np.count_nonzero(one.plain)) for one in shards)
        self.n_marked = sum(one.n_marked for one in shards)
        self.counts = np.zeros(n_features, np.int64)
        for one in shards:
            self.counts += np.diff(one.indptr)

    def blocks(self, max_firings: int) -> Iterator[tuple[Block, Iterator[Firings]]]:
        """Yield blocks of whole features with their firings: at once, or those of one large feature piece by piece."""
        for block in split_features(self.counts, max_firings, max(1, MAX_SEGMENTS // len(self.shards))):
            yield block, self._pieces(block, max_firings)

    def _pieces(self, block: Block, max_firings: int) -> Iterator[Firings]:
        held: list[ShardFirings] = []
        n_firings = 0
        for one in self.shards:
            n_own = int(one.indptr[block.end] - one.indptr[block.first])
            if held and n_firings + n_own > max_firings:
                yield join_shards(held, block, self.half)
                held, n_firings = [], 0
            held.append(one)
            n_firings += n_own
        yield join_shards(held, block, self.half)


def join_shards(shards: Sequence[ShardFirings], block: Block, half: bool) -> Firings:
    """Return the firings of the features of a block, ordered by (feature, row), from shards in rising order.

    `half` says that all shards hold codes of halves, as they are then stored; else float32.
    """
    bounds = np.stack([one.indptr[block.first : block.end + 1] for one in shards]).astype(np.int64)
    slices = [slice(first, end) for first, end in zip(bounds[:, 0], bounds[:, -1], strict=True)]
    counts = np.diff(bounds)
    reached = np.cumsum(counts.sum(1)) - counts.sum(1)
    # What a (feature, shard) has lies together on both sides; each such run moves as one.
    starts = (bounds[:, :-1] + (reached - bounds[:, 0])[:, None]).T.reshape(-1)
    lengths = counts.T.reshape(-1)
    order = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    order += np.arange(len(order))
    features = np.repeat(np.arange(block.end - block.first, dtype=np.int32), counts.sum(0))
    rows = np.concatenate([one.places[own] + np.int64(one.first_row) for one, own in zip(shards, slices, strict=True)])
    plain = np.concatenate([one.plain[one.places[own]] for one, own in zip(shards, slices, strict=True)])
    stored = [one.stored[own] if half else decoded(one.stored[own]) for one, own in zip(shards, slices, strict=True)]
    return Firings(block.first, features, rows[order], np.concatenate(stored)[order], plain[order])


def _write_range(
    workshop: Workshop, sae: str, held: _Range, cover: Cover, whole: bool
) -> tuple[Part, list[Summary | Block]]:
    n_features, n_firings = len(held.counts), int(held.counts.sum())
    # Examples are kept until the part is done; of a very wide SAE they are read back instead.
    whole = whole and n_features * EXAMPLES * BYTES_PER_EXAMPLE <= workshop.memory_bytes // 8
    summaries: list[Summary | Block] = []
    max_firings = block_firings(workshop)

    def appended() -> Iterator[Firings]:
        for block, pieces in held.blocks(max_firings):
            for firings in pieces:
                yield firings
                if whole and block.n_firings <= max_firings:
                    summaries.append(summarise_block(block, firings.only_plain(), held.plain_rows))
            if whole and block.n_firings > max_firings:
                summaries.append(block)

    types = firing_types(held.half, n_firings, n_features, held.n_marked)
    with workshop.writing("firings", f"firings.{sae}.{cover.first}-{cover.end}", **types) as writer:
        append_firings(writer, appended())
    facts = {"activation": "half" if held.half else "float", "plain_rows": held.plain_rows}
    return workshop.finish("firings", sae, writer, [cover], facts), summaries
