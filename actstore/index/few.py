"""Answers of few rows: fetched as values, because DuckDB binds and plans a statement twice for an Arrow stream.

Planning is most of a short question. So a statement that keeps at most FEW rows, by its own LIMIT, is executed as it is
and its values become Arrow here; every other is streamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb
import pyarrow as pa

from actstore.plain_arrow import array_of

from .narrowing import Parameters, bound_value

__all__ = ["Limit", "few_rows", "keeps_few", "limit_of"]

FEW = 1000

Node = Mapping[str, Any]
Limit = tuple[int | None, str | None]  # rows as the text says, or else the parameter that says them

# Whose values Python and Arrow hold alike; what answers have of others is for DuckDB to encode.
_ALIKE = {
    "BOOLEAN": "bool",
    "TINYINT": "int8",
    "SMALLINT": "int16",
    "INTEGER": "int32",
    "BIGINT": "int64",
    "UTINYINT": "uint8",
    "USMALLINT": "uint16",
    "UINTEGER": "uint32",
    "UBIGINT": "uint64",
    "FLOAT": "float32",
    "DOUBLE": "float64",
    "VARCHAR": "string",
}


def limit_of(select: Node | None) -> Limit:
    """Return how many rows the outermost node of a statement keeps, as far as that is said by one number."""
    for modifier in select["modifiers"] if select else ():
        if modifier["type"] == "LIMIT_MODIFIER" and modifier["limit_type"] == "ROW_COUNT" and modifier["limit"]:
            limit = modifier["limit"]
            if limit["class"] == "PARAMETER":
                return None, limit["identifier"]
            if limit["class"] == "CONSTANT" and limit["literal"]["kind"] == "INTEGER":
                return int(limit["literal"]["text"]), None
    return None, None


def keeps_few(limit: Limit, parameters: Parameters) -> bool:
    """Whether a statement with this limit keeps at most FEW rows."""
    said, parameter = limit
    value = said if parameter is None else bound_value(parameter, parameters)
    return isinstance(value, int) and 0 <= value <= FEW


def few_rows(executed: duckdb.DuckDBPyConnection) -> pa.Table | None:
    """Return all rows of an executed statement, None where a column's type is not one of those that are alike."""
    names, kinds, *_ = zip(*executed.description, strict=True)
    alike = [_ALIKE[str(kind)] for kind in kinds if str(kind) in _ALIKE]
    if len(alike) < len(kinds):
        return None
    columns = list(zip(*executed.fetchall(), strict=True)) or [()] * len(names)
    arrays = [array_of(values, kind) for values, kind in zip(columns, alike, strict=True)]
    return pa.Table.from_arrays(arrays, names=list(names))
