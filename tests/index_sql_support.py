"""An index to ask SQL of, with functions of the tests' own: some answer, some raise."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow as pa
from index_support import HALF, FakeSource

from actstore.errors import UnknownName
from actstore.index import Connection, SqlFunction, build_index, open_index, read_catalog


def _snippet(rows: pa.Array, before: pa.Array, after: pa.Array) -> pa.Array:
    return pa.array([f"{r}-{b}+{a}" for r, b, a in zip(*(c.to_pylist() for c in (rows, before, after)), strict=True)])


def _refuse(rows: pa.Array) -> pa.Array:
    raise UnknownName(f"There is no row {rows[0]}. Accepted: 0-9.")


def _broken(rows: pa.Array) -> pa.Array:
    raise KeyError("a fault of the function itself")


LABELS = [(HALF, 3, "a label")]
FUNCTIONS = [
    SqlFunction("snippet", _snippet, ("BIGINT", "INTEGER", "INTEGER"), "VARCHAR"),
    SqlFunction("refuse", _refuse, ("BIGINT",), "VARCHAR"),
    SqlFunction("broken", _broken, ("BIGINT",), "VARCHAR"),
    SqlFunction("is_missing", lambda rows: rows.is_null(), ("BIGINT",), "BOOLEAN", nulls="special"),
    SqlFunction(
        "pairs", lambda rows: pa.array([[{"a": 1, "b": 0.5}]] * len(rows)), ("BIGINT",), "STRUCT(a INTEGER, b FLOAT)[]"
    ),
    SqlFunction("seven", lambda: pa.array([7]), (), "INTEGER"),
]


def built_index(directory: Path) -> tuple[FakeSource, Path]:
    """Build the index of a truth in memory, and return both."""
    source = FakeSource()
    source.extract(0, 1, 3)
    build_index(source, directory)
    return source, directory


def connected(directory: Path) -> AbstractContextManager[Connection]:
    """Open an index with the functions."""
    return open_index(
        read_catalog(directory), lambda name: directory / name, functions=FUNCTIONS, labels=LABELS, threads=2
    )
