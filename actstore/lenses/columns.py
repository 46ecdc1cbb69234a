"""Arrow columns of a function's batch: grouped by name, put back in order, and lists made of flat numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["by_name", "in_order", "in_one", "lists_of", "places_by_name", "ragged"]


def by_name(names: pa.Array, numbers: pa.Array, kind: pa.DataType, gather: Callable[..., pa.Array]) -> pa.Array:
    """Call `gather(name, numbers)` once for each distinct name, and put the answers back in order."""
    asked, places = np.asarray(numbers, dtype=np.int64), places_by_name(names)
    if len(places) == 1:
        return gather(*places, asked)
    parts = [gather(name, asked[here]) for name, here in places.items()]
    return in_order(parts, list(places.values()), kind)


def places_by_name(names: pa.Array) -> dict[Any, npt.NDArray[np.intp]]:
    """Return the places of each distinct name, in the order of their first; there is no NULL among them."""
    encoded = in_one(names).dictionary_encode()
    numbers = np.asarray(encoded.indices)
    return {name: np.flatnonzero(numbers == number) for number, name in enumerate(encoded.dictionary.to_pylist())}


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
