"""Calling functions late: a statement that keeps the first rows of an order calls its functions on those rows alone.

DuckDB computes the whole select list before it orders, so `SELECT snippet(row, 10, 10) AS example … ORDER BY …
LIMIT 20` would make a snippet of every firing of the feature. Such a call is turned into its arguments inside of the
statement and made outside of it:

    SELECT * REPLACE (snippet("example"[1], "example"[2], "example"[3]) AS "example")
    FROM (SELECT row(row, 10, 10) AS example … ORDER BY … LIMIT 20)

Only the name of the function is replaced in the text, at the place where DuckDB says it is. Whatever is not certain to
mean the same is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .schema import quote_name

__all__ = ["call_late"]

Node = Mapping[str, Any]


def call_late(text: str, select: Node, nodes: Iterable[Node], functions: Collection[str]) -> str | None:
    """Return the statement that calls `functions` late, or None where that does not help or might change its meaning.

    `select` is the outermost node of the parsed statement, `nodes` all of its nodes.
    """
    if not _keeps_first_rows(select):
        return None
    names = [_name(item) for item in select["select_list"]]
    mentioned = {str(node["column_names"][-1]).lower() for node in nodes if node.get("class") == "COLUMN_REF"}
    calls = [
        item
        for item, name in zip(select["select_list"], names, strict=True)
        if _is_call(item, functions) and name not in mentioned
    ]
    spliced = _splice(text.encode(), calls)
    if not calls or None in names or len(set(names)) < len(names) or spliced is None:
        return None
    made = ", ".join(_call(item) for item in calls)
    return f"SELECT * REPLACE ({made}) FROM (\n{spliced.strip().removesuffix(';')}\n)"


def _keeps_first_rows(select: Node) -> bool:
    kinds = [modifier["type"] for modifier in select.get("modifiers", [])]
    if select["type"] != "SELECT_NODE" or sorted(kinds) != ["LIMIT_MODIFIER", "ORDER_MODIFIER"]:
        return False
    (order,) = (modifier for modifier in select["modifiers"] if modifier["type"] == "ORDER_MODIFIER")
    # Numbers and ALL name columns of the select list, which changes.
    named = all(entry["expression"]["class"] not in ("CONSTANT", "STAR") for entry in order["orders"])
    grouped = select["group_expressions"] or select["group_sets"] or select["having"] or select["qualify"]
    return named and not grouped and select["aggregate_handling"] == "STANDARD_HANDLING"


def _name(item: Node) -> str | None:
    """Return the name of a column of the answer in lower case, its class where it has none, None for a star."""
    if item["class"] == "STAR":
        return None
    if item["alias"]:
        return str(item["alias"]).lower()
    return str(item["column_names"][-1]).lower() if item["class"] == "COLUMN_REF" else f"({item['query_location']})"


def _is_call(item: Node, functions: Collection[str]) -> bool:
    named = item.get("function_name") in functions and item["alias"] and item["arguments"]
    return bool(named) and not (item["distinct"] or item["filter"] or item["order_bys"]["orders"])


def _splice(text: bytes, calls: Iterable[Node]) -> str | None:
    """Return the text with `row` in place of each called name, or None where a name is not spelled as itself."""
    for item in sorted(calls, key=lambda item: int(item["query_location"]), reverse=True):
        start = item["query_location"]
        end = start + len(item["function_name"])
        if text[start:end].lower() != item["function_name"].encode() or not text[end:].lstrip().startswith(b"("):
            return None
        text = text[:start] + b"row" + text[end:]
    return text.decode()


def _call(item: Node) -> str:
    name = quote_name(item["alias"])
    arguments = ", ".join(f"{name}[{place}]" for place in range(1, len(item["arguments"]) + 1))
    return f"{item['function_name']}({arguments}) AS {name}"
