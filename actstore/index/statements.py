"""Which statements the read path accepts: one question, over the tables of the contract.

DuckDB parses the text and says what is in it; everything in that tree is compared with lists of what is allowed, so
a kind of node or function that a later release adds is refused until somebody has looked at it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb

from actstore.errors import QueryError, explain

from .engine import one_line
from .schema import TABLES

__all__ = ["ACCEPTED", "MAX_TEXT_BYTES", "Statement", "below", "check_statement"]

MAX_TEXT_BYTES = 1 << 16
ACCEPTED = (
    "one SELECT (also WITH, FROM, VALUES), DESCRIBE, SHOW TABLES, SUMMARIZE, or EXPLAIN (the first word) of a SELECT"
)

# No comment may stand before or within: where one ends is for DuckDB's parser to say, which nests them.
_EXPLAIN = re.compile(r"\s*EXPLAIN\s+(ANALYZE\s+)?", re.IGNORECASE | re.ASCII)
# DuckDB's own relations, and what it would take for a file, are found by a bare name where no CTE of that name reaches.
_NOT_FOR_CTES = re.compile(r"(duckdb|pg|pragma|sqlite)_.*|.*[./:\\].*", re.IGNORECASE | re.DOTALL)
_QUERY_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
_SOURCES = frozenset(
    {"BASE_TABLE", "EMPTY", "EXPRESSION_LIST", "JOIN", "PIVOT", "SHOW_REF", "SUBQUERY", "TABLE_FUNCTION"}
)
_TABLE_FUNCTIONS = frozenset({"generate_series", "json_each", "json_tree", "range", "repeat", "unnest"})
_REFUSED_FUNCTIONS = frozenset({"current_setting", "getenv", "pg_sleep", "sleep_ms", "write_log"})
_FUNCTIONS_SHOWN = ", ".join(sorted(_TABLE_FUNCTIONS)) + ", and the tables: " + ", ".join(TABLES)

Node = dict[str, Any]


@dataclass(frozen=True)
class Statement:
    """One statement that was found to be only reading, with its outermost node (None for EXPLAIN) and all nodes.

    `text` is what to execute: nothing else was checked.
    """

    text: str
    select: Node | None
    nodes: Sequence[Node]


def check_statement(
    connection: duckdb.DuckDBPyConnection, text: str, parts: Collection[tuple[str, ...]] = ()
) -> Statement:
    """Return what `text` says; raises QueryError unless it is one statement that only reads tables of the contract.

    `parts` are whole names of tables that may be read as well: for a text that was checked without them, then narrowed.
    """
    if len(text.encode(errors="replace")) > MAX_TEXT_BYTES:
        raise QueryError(
            explain(
                f"The statement has more than {MAX_TEXT_BYTES >> 10} KB", next_step="bind long values as parameters"
            )
        )
    explained = _EXPLAIN.match(text)
    question = text[explained.end() :] if explained else text
    tree = _parse(connection, question)
    nodes = list(below(tree))
    _check_nodes(nodes, parts)
    if not explained:
        _check_kind_of_text(connection, text, duckdb.StatementType.SELECT)
        return Statement(text, tree["statements"][0]["node"], nodes)
    checked = f"EXPLAIN {'ANALYZE ' if explained[1] else ''}{question}"
    _check_kind_of_text(connection, checked, duckdb.StatementType.EXPLAIN)
    return Statement(checked, None, nodes)


def _check_nodes(nodes: Sequence[Node], parts: Collection[tuple[str, ...]]) -> None:
    ctes = {str(entry["key"]).lower() for node in nodes for entry in _ctes(node)}
    for name in ctes:
        if _NOT_FOR_CTES.fullmatch(name):
            raise QueryError(explain(f"A query of WITH cannot be called {name!r}", accepted="a name of its own"))
    for node in nodes:
        _check_kind(node)
        _check_function(node)
        if node.get("type") == "BASE_TABLE" and tuple(node["qualified_name"]["path"]) not in parts:
            _check_table(node, ctes)


def _check_kind_of_text(connection: duckdb.DuckDBPyConnection, text: str, expected: duckdb.StatementType) -> None:
    """Refuse what the parser of the execution reads as anything but one statement of the expected kind."""
    try:
        found = [statement.type for statement in connection.extract_statements(text)]
    except duckdb.Error as error:
        raise QueryError(one_line(error)) from None
    if found != [expected]:
        raise QueryError(explain("This statement does more than read the tables", accepted=ACCEPTED))


def _parse(connection: duckdb.DuckDBPyConnection, text: str) -> Node:
    try:
        ((tree,),) = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [text]).fetchall()
        parsed: Node = json.loads(tree)
    except duckdb.Error as error:
        raise QueryError(one_line(error)) from None
    except RecursionError:
        raise QueryError("The statement is nested too deeply") from None
    if parsed["error"]:
        raise _not_parsed(parsed)
    if len(parsed["statements"]) != 1:
        raise QueryError(explain(f"There are {len(parsed['statements'])} statements", accepted=ACCEPTED))
    return parsed


def _not_parsed(parsed: Node) -> QueryError:
    if parsed["error_type"] == "not implemented":
        return QueryError(explain("This statement does more than read", accepted=ACCEPTED))
    return QueryError(explain(" ".join(str(parsed["error_message"]).split()), accepted=ACCEPTED))


def below(tree: Any) -> Iterator[Node]:
    """Yield all nodes of a statement's tree, however deep."""
    waiting: list[Any] = [tree]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield found
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(found)


def _ctes(node: Node) -> list[Node]:
    held = node.get("cte_map")
    return held["map"] if isinstance(held, dict) else []


def _check_kind(node: Node) -> None:
    kind = node.get("type")
    changes = "cte_map" in node and kind not in _QUERY_NODES
    unknown = node.keys() >= {"alias", "sample"} and kind not in _SOURCES
    if changes or unknown or (kind == "SHOW_REF" and _show_refused(node)):
        raise QueryError(explain("This statement does more than read the tables", accepted=ACCEPTED))


def _show_refused(node: Node) -> bool:
    described = node["show_type"] in ("DESCRIBE", "SUMMARY") and node["query"] is not None
    lists_tables = node["show_type"] == "SHOW_SPECIAL" and node["table_name"].strip('"').lower() == "tables"
    return not (described or lists_tables)


def _check_function(node: Node) -> None:
    if node.get("type") == "TABLE_FUNCTION":
        name = str(node["function"].get("function_name", "")).lower()
        if name not in _TABLE_FUNCTIONS:
            raise QueryError(explain(f"The table function {name!r} is not available here", accepted=_FUNCTIONS_SHOWN))
    name = str(node.get("function_name", "")).lower()
    if name in _REFUSED_FUNCTIONS:
        raise QueryError(explain(f"The function {name!r} is not available here", accepted="functions of values"))


def _check_table(node: Node, ctes: set[str]) -> None:
    path = node["qualified_name"]["path"]
    known = ctes | TABLES.keys() if len(path) == 1 else set(TABLES)
    if path[:-1] in ([], ["main"]) and path[-1].lower() in known:
        return
    name = ".".join(path)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise QueryError(explain(f"There is no table {name!r}.{hint}", accepted=", ".join(TABLES)))
