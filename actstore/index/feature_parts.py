"""The part of an SAE's features: statistics, examples and logits, from its firings.

Where all firings come in one range they are summarised on their way into its part (`firing_parts`). Else they are read
back in blocks of whole features, so that memory does not grow with the corpus; a feature that alone exceeds a block is
counted and ranked by DuckDB, which spills.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.sealed import digest_of, sha256_hex

from .ahead import ahead
from .attaching import attach_parts
from .catalog import Part
from .engine import fetch_columns
from .firing_blocks import Firings
from .parts import PartWriter, Workshop
from .statistics import EXAMPLES, FeatureSummary, Values, decoded, summarise, top_rows, weakest_examples
from .views import coded_query, firings_query

__all__ = [
    "Block",
    "Summary",
    "attach_firings",
    "block_firings",
    "content_of_features",
    "feature_blocks",
    "fetch_firings",
    "sorted_firings",
    "split_features",
    "summarise_block",
    "write_features",
]

MAX_BLOCK_FIRINGS = 500_000  # larger blocks gain nothing: their temporaries leave the processor's cache
BYTES_PER_BLOCK_FIRING = 128  # columns of a block, its sort keys and the temporaries of the statistics
MAX_BLOCK_FEATURES = 1 << 16

Logits = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Block:
    """Whole features [first, end) with the number of their firings."""

    first: int
    end: int
    n_firings: int


@dataclass(frozen=True)
class Summary:
    """What the tables `features` and `examples` say of a block."""

    features: pa.Table
    examples: pa.Table


def content_of_features(firings: Sequence[Part], logits: Logits | None) -> str:
    """Return a digest of what a features part is made from."""
    covers = sorted([cover.first, cover.receipts] for part in firings for cover in part.covers)
    arrays = [] if logits is None else [sha256_hex(np.ascontiguousarray(array).data) for array in logits]
    return digest_of([covers, arrays])


def write_features(
    workshop: Workshop,
    sae: str,
    n_features: int,
    firings: Sequence[Part],
    logits: Logits | None,
    known: Sequence[Summary | Block] = (),
) -> Part:
    """Write features, examples and feature_logits of one SAE as one part.

    `known` are the summaries of all features in order, with blocks where one has to be read back; without any, all are.
    """
    plain_rows = sum(int(part.facts["plain_rows"]) for part in firings)
    half = all(part.facts["activation"] == "half" for part in firings)
    with workshop.writing("features", f"features.{sae}") as writer:
        with writer.connection.cursor() as reading:
            attach_firings(reading, workshop, firings, coded=half)
            blocks = known or feature_blocks(reading, n_features, block_firings(workshop))
            for summary in _summaries(reading, blocks, plain_rows, block_firings(workshop)):
                _append_block(writer, summary)
        if logits is not None:
            writer.append("feature_logits", _logits_table(*logits))
    return workshop.finish("features", sae, writer, facts={"content": content_of_features(firings, logits)})


def block_firings(workshop: Workshop) -> int:
    """Return how many firings may be in memory at once."""
    return min(MAX_BLOCK_FIRINGS, workshop.memory_bytes // BYTES_PER_BLOCK_FIRING)


def attach_firings(
    connection: duckdb.DuckDBPyConnection, workshop: Workshop, parts: Sequence[Part], *, coded: bool = False
) -> None:
    """Attach firings parts and make the view `firings` (feature, row, activation, plain) over them.

    `coded` leaves activations as half codes; every part must hold halves then.
    """
    attached = attach_parts(connection, parts, lambda part: workshop.directory / part.name)
    nothing = "SELECT 0 AS feature, 0::BIGINT AS row, 0::FLOAT AS activation, true AS plain WHERE false"
    query = (coded_query if coded else firings_query)(attached) or nothing
    connection.execute(f"CREATE TEMP VIEW firings AS SELECT feature, row, activation, plain FROM ({query})")


def feature_blocks(
    connection: duckdb.DuckDBPyConnection, n_features: int, max_firings: int, where: str = "plain"
) -> Iterator[Block]:
    """Yield features in order, together while their firings fit; one that alone exceeds comes alone."""
    counted = fetch_columns(connection, f"SELECT feature, count(*) AS n FROM firings WHERE {where} GROUP BY feature")
    counts = np.zeros(n_features, np.int64)
    counts[counted["feature"]] = counted["n"]
    return split_features(counts, max_firings, MAX_BLOCK_FEATURES)


def split_features(counts: npt.NDArray[np.int64], max_firings: int, max_features: int) -> Iterator[Block]:
    """Yield blocks of at most so many firings and features; `counts` has the firings of each feature."""
    reached = np.concatenate([[0], np.cumsum(counts)])
    first = 0
    while first < len(counts):
        fitting = int(np.searchsorted(reached, reached[first] + max_firings, side="right")) - 1
        end = min(max(fitting, first + 1), first + min(max_features, MAX_BLOCK_FEATURES))
        yield Block(first, end, int(reached[end] - reached[first]))
        first = end


def fetch_firings(connection: duckdb.DuckDBPyConnection, block: Block, where: str = "true") -> Firings:
    """Return the firings of a block from the view `firings`, part after part."""
    chosen = f"{where} AND feature >= {block.first} AND feature < {block.end}"
    return _of_columns(block, fetch_columns(connection, f"SELECT * FROM firings WHERE {chosen}"))


def sorted_firings(connection: duckdb.DuckDBPyConnection, block: Block, max_firings: int) -> Iterator[Firings]:
    """Yield the firings of a block's one feature by row, at most about so many at a time; DuckDB orders, and spills."""
    found = connection.sql(f"SELECT * FROM firings WHERE feature = {block.first} ORDER BY row")
    for batch in found.to_arrow_reader(max_firings):
        yield _of_columns(block, {name: batch[name].to_numpy(zero_copy_only=False) for name in batch.schema.names})


def _of_columns(block: Block, read: Mapping[str, npt.NDArray[Any]]) -> Firings:
    features = read["feature"] - np.int32(block.first)
    return Firings(block.first, features, read["row"], read["activation"], read["plain"])


def summarise_block(block: Block, firings: Firings, plain_rows: int) -> Summary:
    """Return what is known of the features of a block from its firings on plain rows."""
    values = Values.of_firings(firings.features, firings.stored, block.end - block.first)
    places, ranks = top_rows(firings.features, firings.stored, firings.rows, weakest_examples(values))
    examples = {
        "feature": firings.features[places] + np.int32(block.first),
        "rank": ranks,
        "row": firings.rows[places],
        "activation": decoded(firings.stored[places]),
    }
    return Summary(_features_table(block, summarise(values), plain_rows), pa.table(examples))


def _summaries(
    connection: duckdb.DuckDBPyConnection, known: Iterable[Summary | Block], plain_rows: int, max_firings: int
) -> Iterator[Summary]:
    """Yield summaries in order; while one is made, the firings of the next block are read."""

    def read(one: Summary | Block) -> tuple[Block, Firings] | Summary:
        if isinstance(one, Summary):
            return one
        if one.n_firings > max_firings:
            return _large_summary(connection, one, plain_rows)
        return one, fetch_firings(connection, one, "plain")

    for found in ahead(read, known, 1):
        yield found if isinstance(found, Summary) else summarise_block(*found, plain_rows)


def _large_summary(connection: duckdb.DuckDBPyConnection, block: Block, plain_rows: int) -> Summary:
    where = f"plain AND feature = {block.first}"
    counted = fetch_columns(
        connection, f"SELECT activation, count(*) AS times FROM firings WHERE {where} GROUP BY activation"
    )
    read = fetch_columns(
        connection,
        f"SELECT row, activation FROM firings WHERE {where} ORDER BY activation DESC, row LIMIT {EXAMPLES}",
    )
    examples = {
        "feature": np.full(len(read["row"]), block.first, np.int32),
        "rank": np.arange(1, len(read["row"]) + 1, dtype=np.int32),
        "row": read["row"],
        "activation": decoded(read["activation"]),
    }
    summary = summarise(Values.of_one_feature(counted["activation"], counted["times"]))
    return Summary(_features_table(block, summary, plain_rows), pa.table(examples))


def _append_block(writer: PartWriter, summary: Summary) -> None:
    writer.append("features", summary.features)
    writer.append("examples", summary.examples)


def _features_table(block: Block, summary: FeatureSummary, plain_rows: int) -> pa.Table:
    n_features, n_bins = summary.histogram.shape
    bounds = pa.array(np.arange(0, n_features * n_bins + 1, n_bins, dtype=np.int32))
    columns = {
        "feature": np.arange(block.first, block.end, dtype=np.int32),
        "n_firings": summary.n_firings,
        "density": summary.n_firings / max(plain_rows, 1),
        "max_activation": summary.maximum,
        "mean_activation": summary.mean,
        "std_activation": summary.std,
        "p50": summary.percentiles[:, 0],
        "p90": summary.percentiles[:, 1],
        "p99": summary.percentiles[:, 2],
        "histogram": pa.ListArray.from_arrays(bounds, pa.array(summary.histogram.reshape(-1))),
    }
    return pa.table(columns)


def _logits_table(token_ids: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> pa.Table:
    n_features, n_ranks = token_ids.shape
    high, low = n_ranks - n_ranks // 2, n_ranks // 2
    ranks = np.concatenate([np.arange(1, high + 1), -np.arange(1, low + 1)]).astype(np.int32)
    columns = {
        "feature": np.repeat(np.arange(n_features, dtype=np.int32), n_ranks),
        "rank": np.tile(ranks, n_features),
        "token_id": token_ids.reshape(-1),
        "logit": logits.reshape(-1),
    }
    return pa.table(columns)
