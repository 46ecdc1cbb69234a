"""Tables of the contract, and firings in feature order, as Parquet: a replica that any engine reads.

    OUT/tokens/part-00000.parquet …                  a table, its columns as in SQL
    OUT/activations/sae=<id>/part-00000.parquet …    firings of one SAE by (feature, row); `sae` is a hive partition
    OUT/digests.json                                 files with SHA-256, bytes, rows, bounds

Firings come by (feature, row), as in the index: one feature is one run of rows, found by the statistics of row groups
and pages; rows that increase take fewer bytes than rows by activation (2.8 against 3.7 a firing), and the strongest
are in `examples`. `activation` is FLOAT16 where that is exact for the whole SAE, else FLOAT.

Everything is asked for in blocks that are sorted one by one, so that memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.errors import unknown_name
from actstore.index import TABLES
from actstore.progress import Report

from .parquet_files import ParquetFolder, write_digests
from .source import Source
from .target import Exported, exported, new_target

__all__ = ["ORDERS", "Order", "export_parquet"]

FIRINGS, ALL = "activations", "all"
BLOCK_ROWS = 1_000_000
BLOCK_FIRINGS = 4_000_000


@dataclass(frozen=True)
class Order:
    """How a table's rows are sorted: by `groups`, of which there are few, then by `key`, in blocks, then by `then`."""

    groups: tuple[str, ...]
    key: str
    then: tuple[str, ...] = ()
    block_rows: int = BLOCK_ROWS

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.groups, self.key, *self.then)


ORDERS = {
    "documents": Order((), "doc", block_rows=5_000),  # with their texts
    "sequences": Order((), "seq"),
    "tokens": Order((), "row"),
    "vocabulary": Order((), "token_id"),
    "predictions": Order((), "row"),
    "features": Order(("sae",), "feature"),
    "examples": Order(("sae",), "feature", ("rank",)),
    "feature_logits": Order(("sae",), "feature", ("rank",)),
    "reconstruction": Order(("sae",), "row"),
    "attention": Order(("layer",), "row", ("head", "key_row")),
    "attention_rows": Order(("layer",), "row", ("head",)),
    "lens_tokens": Order(("lens", "site"), "row", ("rank",)),
    "lens_summary": Order(("lens", "site"), "row"),
}
"""The tables that grow; those that are not here are small and come as they are."""


def export_parquet(source: Source, what: Sequence[str], out: Path, *, report: Report) -> Exported:
    """Write tables and SAEs' firings into the new directory `out`.

    `what` are names of tables, ids of SAEs (their firings), `activations` (those of every SAE) or `all`.
    Raises UnknownName, offering the nearest, for anything else, MissingInput where the index lacks firings.
    """
    tables, saes = _chosen(source, what)
    for sae in saes:
        source.must_be_indexed(sae)
    with new_target(out) as root:
        root.mkdir()
        folders = [_write_table(source, table, root, report) for table in tables]
        folders += [_write_firings(source, sae, root, report) for sae in saes]
        model = source.reader.store.model["identity"]["name"]
        write_digests(root, folders, {"model": model, "catalog": source.index[0].name})
    return exported(out, sum(folder.n_rows for folder in folders))


def _chosen(source: Source, what: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the tables and the SAEs that `what` names, each once."""
    known = [ALL, *TABLES, *source.saes]
    for name in what:
        if name not in known:
            raise unknown_name("table or stored SAE", name, known)
    tables = [table for table in TABLES if table != FIRINGS and (table in what or ALL in what)]
    every = FIRINGS in what or ALL in what
    return tables, [sae for sae in source.saes if every or sae in what]


def _write_table(source: Source, table: str, root: Path, report: Report) -> ParquetFolder:
    columns = ", ".join(TABLES[table])
    schema = _plain_schema(source.table(f"SELECT {columns} FROM {table} LIMIT 0").schema)
    order = ORDERS.get(table)
    report(f"exporting {table}", 0, None, "rows")
    with ParquetFolder(root / table, schema, order.columns if order else ()) as folder:
        for condition, parameters in _blocks(source, table, order) if order else [("", {})]:
            for batch in source.batches(f"SELECT {columns} FROM {table} {condition}", parameters):
                folder.append(pa.Table.from_batches([batch]))
            report(f"exporting {table}", folder.n_rows, None, "rows")
    return folder


def _plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema without extension types: JSON is text to readers that do not know it."""
    types = [field.type for field in schema]
    plain = [kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind for kind in types]
    return pa.schema(list(zip(schema.names, plain, strict=True)))


def _blocks(source: Source, table: str, order: Order) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield condition and parameters of each block of a table: about `block_rows` rows that are sorted together."""
    groups = ", ".join(order.groups)
    grouped = f"GROUP BY {groups} ORDER BY {groups}" if groups else ""
    listed = "".join(f"{name}, " for name in order.groups)
    found = source.table(
        f"SELECT {listed} min({order.key}) AS low, max({order.key}) AS high, count(*) AS n FROM {table} {grouped}"
    )
    conditions = [f"{name} = ${name}" for name in order.groups]
    where = " AND ".join([*conditions, f"{order.key} >= $low AND {order.key} < $high"])
    for one in found.to_pylist():
        low, high, n_rows = one.pop("low"), one.pop("high"), one.pop("n")
        step = max(1, (high - low + 1) * order.block_rows // n_rows) if n_rows else 1
        for start in range(low, high + 1, step) if n_rows else ():
            yield f"WHERE {where} ORDER BY {', '.join(order.columns)}", {**one, "low": start, "high": start + step}


def _write_firings(source: Source, sae: str, root: Path, report: Report) -> ParquetFolder:
    parts = source.index[0].select("firings", sae)
    exact = all(part.facts["activation"] == "half" for part in parts)
    kind = pa.float16() if exact else pa.float32()
    schema = pa.schema([("feature", pa.int32()), ("row", pa.int64()), ("activation", kind)])
    counts = _counts(source, sae)
    sql = (
        "SELECT feature, row, activation FROM activations WHERE sae = $sae"
        " AND feature >= $first AND feature < $end AND row >= $first_row AND row < $end_row ORDER BY feature, row"
    )
    with ParquetFolder(root / FIRINGS / f"sae={sae}", schema, ("feature", "row")) as folder:
        for bounds in _firing_blocks(counts, source.reader.layout.n_shards * source.reader.shard_rows):
            for batch in source.batches(sql, {"sae": sae, **bounds}):
                folder.append(pa.Table.from_batches([batch]))
            report(f"exporting firings of {sae}", folder.n_rows, int(counts.sum()), "firings")
    return folder


def _counts(source: Source, sae: str) -> npt.NDArray[np.int64]:
    """Return how often each feature fires, on whatever row: int64 (feature)."""
    counts = np.zeros(int(source.sae(sae)["width"]), np.int64)
    found = source.table("SELECT feature, count(*) AS n FROM activations WHERE sae = $sae GROUP BY ALL", {"sae": sae})
    counts[found.column("feature").to_numpy()] = found.column("n").to_numpy()
    return counts


def _firing_blocks(counts: npt.NDArray[np.int64], n_rows: int) -> Iterator[Mapping[str, int]]:
    """Yield bounds of features and rows, in order, between which at most BLOCK_FIRINGS lie."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        before = int(ends[first - 1]) if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + BLOCK_FIRINGS, side="right")))
        step = BLOCK_FIRINGS if counts[first] > BLOCK_FIRINGS else n_rows  # a feature of its own fires once a row
        for row in range(0, n_rows, step):
            yield {"first": first, "end": end, "first_row": row, "end_row": row + step}
        first = end
