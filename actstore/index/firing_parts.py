"""Firings, feature-major: the exact transpose of what the store holds row by row.

A range of shards is transposed in memory and appended in the order (feature, row). The range ends where the next
shard would exceed the memory; many ranges of one SAE are joined later by `compaction`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.blocks import TOKEN_FIELDS, RowFirings, is_plain
from actstore.errors import CorruptStore, explain

from .catalog import Cover, Part
from .parts import ROW_GROUP_ROWS, PartWriter, Workshop
from .source import Source, row_numbers

__all__ = ["FeatureMajor", "firing_ranges", "half_codes", "transpose", "write_firings"]

MAX_FIRINGS = 64_000_000
# Both orders at once, 12 bytes each (index int32, activation float32, the source's feature), and what DuckDB holds.
BYTES_PER_FIRING = 32


@dataclass(frozen=True)
class ShardFirings:
    """One shard's firings with the number and the plainness of each row in use."""

    shard: int
    rows: npt.NDArray[np.int64]
    plain: npt.NDArray[np.bool_]
    firings: RowFirings


@dataclass(frozen=True)
class FeatureMajor:
    """A range's firings ordered by (feature, row).

    indptr int64 (feature + 1); places int32 (firing) into `rows` and `plain` (row); activations float32 (firing).
    """

    indptr: npt.NDArray[np.int64]
    places: npt.NDArray[np.int32]
    activations: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]
    plain: npt.NDArray[np.bool_]

    def chunk(self, start: int, end: int, activations: npt.NDArray[Any]) -> pa.Table:
        """Return the firings [start, end) as columns of the table `firings`."""
        inside = np.clip(self.indptr, start, end)
        features = np.repeat(np.arange(len(inside) - 1, dtype=np.int32), np.diff(inside))
        places = self.places[start:end]
        columns = {"feature": features, "row": self.rows[places], "activation": activations[start:end]}
        return pa.table({**columns, "plain": self.plain[places]})


def firing_ranges(source: Source, sae: str, shards: Sequence[int], max_firings: int) -> Iterator[list[ShardFirings]]:
    """Yield consecutive shards together while their firings fit; a shard that alone exceeds comes alone."""
    held: list[ShardFirings] = []
    n_firings = 0
    for shard in shards:
        block = _read(source, sae, shard)
        n_firings += len(block.firings.features)
        if held and n_firings > max_firings:
            yield held
            held, n_firings = [], len(block.firings.features)
        held.append(block)
    if held:
        yield held


def transpose(blocks: Sequence[ShardFirings], n_features: int) -> FeatureMajor:
    """Return the firings of some shards ordered by (feature, row).

    Raises CorruptStore for a feature that the SAE does not have.
    """
    from scipy import sparse  # readers of the index never need it

    features = np.concatenate([block.firings.features for block in blocks], dtype=np.int32, casting="same_kind")
    if len(features) and features.max() >= n_features:
        raise CorruptStore(
            explain(f"Shards {blocks[0].shard}-{blocks[-1].shard} hold feature {features.max()} of {n_features}")
        )
    counts = np.concatenate([np.diff(block.firings.indptr)[: len(block.rows)] for block in blocks])
    # int32 throughout: scipy would widen all indices to int64, at three times the cost.
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    activations = np.concatenate([block.firings.activations for block in blocks])
    by_row = sparse.csr_array((activations, features, indptr), shape=(len(counts), n_features))
    by_feature = by_row.tocsc()
    rows = np.concatenate([block.rows for block in blocks])
    plain = np.concatenate([block.plain for block in blocks])
    return FeatureMajor(by_feature.indptr.astype(np.int64), by_feature.indices, by_feature.data, rows, plain)


def half_codes(activations: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16] | None:
    """Return activations as the codes of IEEE halves: uint16 (firing), or None where one is not exactly a half."""
    with np.errstate(over="ignore"):
        halves = activations.astype(np.float16)
    return halves.view(np.uint16) if np.array_equal(halves.astype(np.float32), activations) else None


def write_firings(
    workshop: Workshop, source: Source, sae: str, n_features: int, done: Mapping[int, str]
) -> Iterator[Part]:
    """Write the firings of some shards as parts, one per range, and yield each; `done` has their receipts' digests."""
    for blocks in firing_ranges(source, sae, list(done), min(MAX_FIRINGS, workshop.memory_bytes // BYTES_PER_FIRING)):
        cover = Cover.of(done, [block.shard for block in blocks])
        by_feature = transpose(blocks, n_features)
        blocks.clear()
        yield _write_range(workshop, sae, by_feature, cover)


def _write_range(workshop: Workshop, sae: str, firings: FeatureMajor, cover: Cover) -> Part:
    codes = half_codes(firings.activations)
    stored = firings.activations if codes is None else codes
    stem = f"firings.{sae}.{cover.first}-{cover.end}"
    with workshop.writing("firings", stem, activation="FLOAT" if codes is None else "USMALLINT") as writer:
        append_chunks(writer, firings, stored)
    facts = {"activation": "float" if codes is None else "half", "plain_rows": int(np.count_nonzero(firings.plain))}
    return workshop.finish("firings", sae, writer, [cover], facts)


def append_chunks(writer: PartWriter, firings: FeatureMajor, stored: npt.NDArray[Any]) -> None:
    """Append a range in order, a row group at a time."""
    for start in range(0, len(stored), ROW_GROUP_ROWS):
        writer.append("firings", firings.chunk(start, min(start + ROW_GROUP_ROWS, len(stored)), stored))


def _read(source: Source, sae: str, shard: int) -> ShardFirings:
    flags = source.matrix("corpus/tokens", shard)[:, TOKEN_FIELDS.index("flags")]
    firings = source.firings(sae, shard)
    if firings.n_rows < len(flags) or firings.indptr[len(flags)] != firings.indptr[-1]:
        raise CorruptStore(explain(f"Shard {shard} of {sae} has firings outside its {len(flags)} rows in use"))
    return ShardFirings(shard, row_numbers(source, shard, len(flags)), is_plain(flags), firings)
