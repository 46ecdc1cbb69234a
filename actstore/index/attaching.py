"""Attaching parts: what a part holds beside the tables of its kind is refused before anything in it is used.

A store may come from anywhere, and its digests prove only that its catalog and its parts belong together. A view or a
macro inside a part would run with the rights of whoever reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import duckdb

from actstore.errors import CorruptStore, explain

from .catalog import Part
from .engine import REMAKE, allow_open_files, attach
from .schema import PART_TABLES

__all__ = ["attach_parts", "refuse_callables"]

Listed = list[tuple[str, str, str, bool]]  # table, column, type, whether it is stored as given


def _listing(*sources: tuple[str, str, str, str]) -> str:
    """Return a query for what parts hold beside tables: lists of names, for which DuckDB binds nothing."""
    return " UNION ALL ".join(
        f"SELECT database_name, '{kind} ' || {name} FROM {source}() "
        f"WHERE list_contains($1, database_name) AND {surplus}"
        for kind, name, source, surplus in sources
    )


# A file can call anything in it internal, so only types are taken at that word: of these DuckDB adds its own.
# Indexes, constraints and sequences do nothing where nothing is written, and are not worth the time to look for them.
_RELATIONS = _listing(
    ("schema", "schema_name", "duckdb_schemas", "schema_name <> 'main'"),
    ("view", "view_name", "duckdb_views", "true"),
)
_CALLABLES = _listing(
    ("macro", "function_name", "duckdb_functions", "true"), ("type", "type_name", "duckdb_types", "NOT internal")
)
_COLUMNS = """SELECT database_name, table_name, column_name, data_type, NOT is_generated AND column_default IS NULL
    FROM duckdb_columns() WHERE list_contains($1, database_name) ORDER BY ALL"""


def attach_parts(
    connection: duckdb.DuckDBPyConnection, parts: Sequence[Part], locate: Callable[[Part], Path]
) -> list[tuple[str, Part]]:
    """Attach parts read-only as p0, p1, … and return each alias with its part.

    Raises CorruptStore where one cannot be opened, or holds other relations than the base tables of its kind; NoSpace
    where the process may not have as many files open.
    """
    allow_open_files(len(parts))
    attached = {f"p{number}": part for number, part in enumerate(parts)}
    for alias, part in attached.items():
        attach(connection, locate(part), alias)
    _refuse_listed(connection, attached, _RELATIONS)
    found: dict[str, Listed] = {alias: [] for alias in attached}
    for alias, *column in connection.execute(_COLUMNS, [list(attached)]).fetchall():
        found[alias].append(tuple(column))
    for alias, part in attached.items():
        if found[alias] != _expected(part):
            raise _refused(part, "other tables or columns")
    return list(attached.items())


def refuse_callables(connection: duckdb.DuckDBPyConnection, attached: Sequence[tuple[str, Part]]) -> None:
    """Refuse parts with macros or types, which only the text of a query could name.

    Raises CorruptStore; apart from `attach_parts`, because it takes longer and a build runs only its own queries.
    """
    _refuse_listed(connection, dict(attached), _CALLABLES)


def _refuse_listed(connection: duckdb.DuckDBPyConnection, attached: Mapping[str, Part], listing: str) -> None:
    for alias, what in connection.execute(listing, [list(attached)]).fetchall():
        raise _refused(attached[alias], f"the {what}")


def _expected(part: Part) -> Listed:
    types = {("firings", "activation"): "FLOAT"} if part.facts.get("activation") == "float" else {}
    return sorted(
        (table, column, types.get((table, column), kind), True)
        for table, columns in PART_TABLES[part.kind].items()
        for column, kind in columns.items()
    )


def _refused(part: Part, what: str) -> CorruptStore:
    said = f"The part {part.name} holds {what}, not only the tables {', '.join(PART_TABLES[part.kind])}"
    return CorruptStore(explain(said, next_step=REMAKE))
