"""The part of an SAE's features: statistics, examples and logits, from its firings parts.

Firings are read back in blocks of whole features, so that memory does not grow with the corpus; a feature that alone
exceeds a block is counted and ranked by DuckDB, which spills.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.sealed import digest_of, sha256_hex

from .attaching import attach_parts
from .catalog import Part
from .engine import fetch_columns
from .parts import PartWriter, Workshop
from .statistics import EXAMPLES, FeatureSummary, Values, summarise, top_rows, weakest_examples
from .views import coded_query, firings_query

__all__ = ["attach_firings", "content_of_features", "feature_blocks", "write_features"]

MAX_BLOCK_FIRINGS = 1_000_000  # larger blocks gain nothing: their temporaries leave the allocator's reuse
BYTES_PER_BLOCK_FIRING = 128  # columns of a block, its sort keys and the temporaries of the statistics

Logits = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Block:
    """Whole features [first, end) with their firings on plain rows."""

    first: int
    end: int
    n_firings: int


def content_of_features(firings: Sequence[Part], logits: Logits | None) -> str:
    """Return a digest of what a features part is made from."""
    covers = sorted([cover.first, cover.receipts] for part in firings for cover in part.covers)
    arrays = [] if logits is None else [sha256_hex(np.ascontiguousarray(array).data) for array in logits]
    return digest_of([covers, arrays])


def write_features(
    workshop: Workshop, sae: str, n_features: int, firings: Sequence[Part], logits: Logits | None
) -> Part:
    """Write features, examples and feature_logits of one SAE as one part."""
    plain_rows = sum(int(part.facts["plain_rows"]) for part in firings)
    with workshop.writing("features", f"features.{sae}") as writer:
        attach_firings(writer.connection, workshop, firings)
        for block in feature_blocks(writer.connection, n_features, block_firings(workshop)):
            _append_block(writer, block, plain_rows, block_firings(workshop))
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
    reached = np.concatenate([[0], np.cumsum(counts)])
    first = 0
    while first < n_features:
        end = max(int(np.searchsorted(reached, reached[first] + max_firings, side="right")) - 1, first + 1)
        yield Block(first, end, int(reached[end] - reached[first]))
        first = end


def _append_block(writer: PartWriter, block: Block, plain_rows: int, max_firings: int) -> None:
    where = f"plain AND feature >= {block.first} AND feature < {block.end}"
    values, examples = _large(writer, where) if block.n_firings > max_firings else _small(writer, block, where)
    summary = summarise(values, block.end - block.first)
    writer.append("features", _features_table(block, summary, plain_rows))
    writer.append("examples", examples)


def _small(writer: PartWriter, block: Block, where: str) -> tuple[Values, pa.Table]:
    read = fetch_columns(writer.connection, f"SELECT feature, row, activation FROM firings WHERE {where}")
    features, activations = read["feature"].astype(np.int64) - block.first, read["activation"]
    values = Values.of_firings(features, activations)
    places, ranks = top_rows(features, activations, read["row"], weakest_examples(values, block.end - block.first))
    examples = {"feature": read["feature"][places], "rank": ranks, "row": read["row"][places]}
    return values, pa.table({**examples, "activation": activations[places]})


def _large(writer: PartWriter, where: str) -> tuple[Values, pa.Table]:
    counted = fetch_columns(
        writer.connection, f"SELECT activation, count(*) AS times FROM firings WHERE {where} GROUP BY activation"
    )
    examples = writer.connection.sql(
        f"SELECT feature, row_number() OVER ()::INTEGER AS rank, row, activation FROM "
        f"(SELECT * FROM firings WHERE {where} ORDER BY activation DESC, row LIMIT {EXAMPLES})"
    ).to_arrow_table()
    return Values.of_one_feature(counted["activation"], counted["times"]), examples


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
