"""Arrow arrays from numpy and back by their buffers: `pa.array` and `np.asarray` would import pandas, where it is.

That takes longer than the whole first question, so what nearly every question needs goes this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["array_of", "integer_array", "integers_of", "text_array"]


def integers_of(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Return a column of int32 or int64 without NULL as int64 (row)."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    assert pa.types.is_integer(array.type) and not array.null_count
    dtype = np.dtype(f"int{array.type.bit_width}")
    values = np.frombuffer(
        array.buffers()[1] or b"", dtype=dtype, count=len(array), offset=array.offset * dtype.itemsize
    )
    return values.astype(np.int64)


def integer_array(values: npt.NDArray[np.integer]) -> pa.Array:
    """Return int32 or int64 numbers (row) as an Arrow array."""
    kind = pa.int32() if values.dtype == np.int32 else pa.int64()
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def text_array(texts: Sequence[str | None]) -> pa.Array:
    """Return texts as an Arrow string array; None is NULL."""
    encoded = [(text or "").encode() for text in texts]
    bounds = np.zeros(len(encoded) + 1, dtype=np.int32)
    np.cumsum([len(text) for text in encoded], out=bounds[1:])
    buffers = [_validity(texts), pa.py_buffer(bounds), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def array_of(values: Sequence[Any], kind: str) -> pa.Array:
    """Return Python values, None for NULL, as an Arrow array of "string" or of a numpy dtype, such as "bool".

    Raises OverflowError for integers that the dtype does not hold.
    """
    if kind == "string":
        return text_array(values)
    numbers = np.array([0 if value is None else value for value in values], dtype=kind)
    data = np.packbits(numbers, bitorder="little") if kind == "bool" else numbers
    return pa.Array.from_buffers(pa.type_for_alias(kind), len(values), [_validity(values), pa.py_buffer(data)])


def _validity(values: Sequence[Any]) -> pa.Buffer | None:
    """Return the bits that say which values are there, None where all are."""
    there = np.array([value is not None for value in values], dtype=bool)
    return None if there.all() else pa.py_buffer(np.packbits(there, bitorder="little"))
