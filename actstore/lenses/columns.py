"""Arrow columns of a function's batch: grouped by name, put back in order, and lists made of flat numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["by_name", "in_order", "in_one", "lists_of", "ragged"]


def by_name(names: pa.Array, numbers: pa.Array, kind: pa.DataType, gather: Callable[..., pa.Array]) -> pa.Array:
    """Call `gather(name, numbers)` once for each distinct name, and put the answers back in order."""
    distinct = pc.unique(names).to_pylist()
    asked = np.asarray(numbers, dtype=np.int64)
    if len(distinct) == 1:
        return gather(distinct[0], asked)
    places = [np.flatnonzero(np.asarray(pc.equal(names, name))) for name in distinct]
    parts = [gather(name, asked[here]) for name, here in zip(distinct, places, strict=True)]
    return in_order(parts, places, kind)


def in_order(parts: Sequence[pa.Array], places: Sequence[npt.NDArray[np.intp]], kind: pa.DataType) -> pa.Array:
    """Return the parts as one array, each element at its place."""
    order = np.argsort(np.concatenate([*places, np.empty(0, np.intp)]), kind="stable")
    return pa.concat_arrays([*parts, pa.array([], kind)]).take(pa.array(order))


def in_one(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return a column as one array: DuckDB gives either."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def lists_of(vectors: npt.NDArray[np.float32]) -> pa.Array:
    """Return the rows of a matrix (row, width) as lists of one length."""
    n_rows, width = vectors.shape
    return ragged(np.full(n_rows, width), pa.array(vectors.reshape(-1)))


def ragged(counts: npt.NDArray[np.int64], values: pa.Array) -> pa.Array:
    """Return lists of so many values each, one list after the other."""
    bounds = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=bounds[1:])
    return pa.ListArray.from_arrays(bounds, values)
