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

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .schema import quote_name

__all__ = ["call_late"]

Node = Mapping[str, Any]

_LOCATION = re.compile(r'"query_location(_length)?": \d+')
_SEVERAL = re.compile(r'"class": "star"|"function_name": "unnest"')  # columns, maybe
_WORDS = re.compile(r"[\w ]+")
_WORDS_ALONE = frozenset({"COLLATE", "CONSTANT"})  # what may be spelled in words; all else has brackets or signs


def call_late(text: str, select: Node, nodes: Iterable[Node], functions: Collection[str]) -> str | None:
    """Return the statement that calls `functions` late, or None where that does not help or might change its meaning.

    `select` is the outermost node of the parsed statement, `nodes` all of its nodes.
    """
    if not _keeps_first_rows(select):
        return None
    names = _distinct_names(select["select_list"])
    if names is None:
        return None
    mentioned = {str(node["column_names"][-1]).lower() for node in nodes if node.get("class") == "COLUMN_REF"}
    calls = [
        item
        for item, name in zip(select["select_list"], names, strict=True)
        if _is_call(item, functions) and name not in mentioned
    ]
    spliced = _splice(text.encode(), calls)
    if not calls or spliced is None:
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


def _distinct_names(items: Sequence[Node]) -> list[str] | None:
    """Return what each column is called, in lower case; None where a query over the answer might call one otherwise.

    Of two columns of one name it renames the second. A column that was given no name is called by its text, for which
    its tree stands here: names that could be such a text are not certain to be others, nor are texts that could be one.
    """
    trees = [_LOCATION.sub("", json.dumps(item)).lower() for item in items]
    given = [_given_name(item) for item in items]
    names = [name or tree for name, tree in zip(given, trees, strict=True)]
    unnamed = [item["class"] for item, name in zip(items, given, strict=True) if not name]
    alike = unnamed and not all(_WORDS.fullmatch(name) for name in given if name)
    uncertain = alike or _WORDS_ALONE.intersection(unnamed) or any(map(_SEVERAL.search, trees))
    return None if uncertain or len(set(names)) < len(names) else names


def _given_name(item: Node) -> str:
    """Return the name of a column in lower case, nothing where its text is its name."""
    return str(item["alias"] or (item["column_names"][-1] if item["class"] == "COLUMN_REF" else "")).lower()


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
