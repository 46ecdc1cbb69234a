"""The tables of a layer's attention, shard by shard: edges, what is known of each row, and sums for `heads`.

A head's means are of sums over shards. The sums are whole numbers of 2⁻³², so that they do not depend on the order in
which parts are added: incremental, compacted and appended indexes say the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.blocks import ATTENTION_VALUES, HEAD_METRICS, TOKEN_FIELDS, is_plain

from .source import Source, row_numbers

__all__ = ["UNITS", "attention_tables"]

UNITS = 1 << 32  # of a sum in one

Values = npt.NDArray[np.float32]


def attention_tables(source: Source, layer: int, minimum: float, shard: int) -> Mapping[str, pa.Table]:
    """Return the tables of one shard of a layer; edges lighter than `minimum` are left out."""
    weights, offsets, values = (
        np.ascontiguousarray(source.matrix(f"attention/{layer}/{name}", shard))
        for name in ("weights", "offsets", "values")
    )
    rows = row_numbers(source, shard, len(values))
    flags = source.matrix("corpus/tokens", shard)[:, TOKEN_FIELDS.index("flags")]
    return {
        "attention": _edges(rows, weights, offsets, minimum),
        "attention_rows": _rows(rows, values),
        "head_sums": _head_sums(values[is_plain(flags)]),
    }


def _edges(rows: npt.NDArray[np.int64], weights: Values, offsets: npt.NDArray[Any], minimum: float) -> pa.Table:
    """Return the edges by row, then head, then falling weight: what a row attends to lies together."""
    places, heads, ranks = np.nonzero(weights >= np.float32(minimum))  # NaN, where there is no edge, is not
    found = rows[places]
    columns = {
        "head": heads.astype(np.int32),
        "row": found,
        "key_row": found - offsets[places, heads, ranks],
        "weight": weights[places, heads, ranks],
    }
    return pa.table(columns)


def _rows(rows: npt.NDArray[np.int64], values: Values) -> pa.Table:
    n_rows, n_heads, _ = values.shape
    columns: dict[str, Any] = {
        "head": np.tile(np.arange(n_heads, dtype=np.int32), n_rows),
        "row": np.repeat(rows, n_heads),
    }
    for name in ("kept_weight", "entropy"):
        flat = np.ascontiguousarray(values[:, :, ATTENTION_VALUES.index(name)]).reshape(-1)
        columns[name] = pa.array(flat, mask=np.isnan(flat))
    return pa.table(columns)


def _head_sums(values: Values) -> pa.Table:
    """Return by head and metric how many plain rows have it, and its sum over them in 1 / UNITS."""
    places = [ATTENTION_VALUES.index(name) for name in HEAD_METRICS]
    measured = values[:, :, places].astype(np.float64)
    known = ~np.isnan(measured)
    totals = np.rint(np.where(known, measured, 0) * UNITS).astype(np.int64).sum(axis=0)
    n_heads = values.shape[1]
    columns = {
        "head": np.repeat(np.arange(n_heads, dtype=np.int32), len(places)),
        "metric": np.tile(np.array(HEAD_METRICS), n_heads),
        "n": known.sum(axis=0).astype(np.int64).reshape(-1),
        "total": totals.reshape(-1),
    }
    return pa.table(columns)
