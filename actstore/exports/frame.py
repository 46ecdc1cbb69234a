"""Data frames of AnnData, written while their rows come: tables of the contract become `obs` and `var`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore.index import TABLES

from .hierarchy import TEXT, Column, Hierarchy
from .source import Source

__all__ = ["Frame"]

_TYPES = {"BIGINT": "int64", "INTEGER": "int32", "DOUBLE": "float64", "FLOAT": "float32", "BOOLEAN": "bool"}
_FEW = ("token", "role", "variant", "label")  # texts that repeat, or are mostly missing: categories
_NULLABLE = ("parent",)


class Frame:
    """The data frame at `path`, with columns of one table of the contract; a context manager."""

    def __init__(self, source: Source, root: Hierarchy, path: str, table: str, columns: Sequence[str]) -> None:
        self._types = {name: TABLES[table].get(name, "BIGINT") for name in columns}
        self._stack = ExitStack()
        root.dataframe(path, columns)
        self._index = self._stack.enter_context(root.column(f"{path}/_index", TEXT))
        self._categories: dict[str, pa.Array] = {}
        self._masks: dict[str, Column] = {}
        self._columns = {name: self._column(source, root, f"{path}/{name}", table, name) for name in columns}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, value, at)

    def _column(self, source: Source, root: Hierarchy, path: str, table: str, name: str) -> Column:
        if name in _FEW:
            sql = f"SELECT DISTINCT {name} AS text FROM {table} WHERE {name} IS NOT NULL ORDER BY text"
            self._categories[name] = source.table(sql).column("text").combine_chunks()
            column = root.categorical(path, _texts(self._categories[name]).to_pylist())
        elif name in _NULLABLE:
            column, mask = root.nullable_integers(path)
            self._masks[name] = self._stack.enter_context(mask)
        else:
            column = root.column(path, _TYPES.get(self._types[name], TEXT))
        return self._stack.enter_context(column)

    def append(self, numbers: npt.NDArray[np.int64], columns: Mapping[str, pa.ChunkedArray]) -> None:
        """Append rows: the number that is each one's name, and the values of every column."""
        self._index.append(numbers.astype(str).astype(object))
        for name, column in self._columns.items():
            column.append(self._values(name, columns[name]))

    def _values(self, name: str, values: pa.ChunkedArray) -> npt.NDArray[Any]:
        if name in self._categories:
            codes = pc.index_in(values, value_set=self._categories[name])
            return np.asarray(pc.fill_null(codes, -1))
        if name in self._masks:
            self._masks[name].append(np.asarray(pc.is_null(values)))
            return np.asarray(pc.fill_null(values, 0))
        if name in self._types and self._types[name] not in _TYPES:
            return np.array(_texts(pc.fill_null(values, "")).to_pylist(), dtype=object)
        return np.asarray(values)


def _texts(values: pa.Array) -> pa.Array:
    """Return texts that HDF5 can hold: NUL, which ends a text there, becomes its picture."""
    return pc.replace_substring(values, "\0", "\N{SYMBOL FOR NULL}")
