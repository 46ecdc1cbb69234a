"""Narrowing: a statement that asks about one SAE is planned over the parts of that SAE alone.

Every view is the union of the parts of all SAEs, and DuckDB binds and plans every branch before it leaves out those of
other SAEs: with 26 SAEs of four parts each that takes longer than the answer. So where a condition says which SAE,

    SELECT … FROM activations a JOIN tokens t USING (row) WHERE a.sae = '20-res' AND …

the table's name is replaced in the text by a query over this SAE's parts, which has the same columns:

    SELECT … FROM (SELECT … FROM p3.firings) a JOIN tokens t USING (row) WHERE a.sae = '20-res' AND …

The condition stays, and so do names of columns: an item without a name is called by its text, which is left alone where
a subquery in it names a table. Whatever is not certain to mean the same is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .schema import quote_name
from .statements import below

__all__ = ["Parameters", "Place", "bound_value", "find_places", "narrow"]

Node = Mapping[str, Any]
Parameters = Sequence[Any] | Mapping[str, Any] | None

SUBJECT = "sae"
_ITEMS = ("select_list", "group_expressions", "having", "qualify", "modifiers")
_JOINS = {"INNER": ("left", "right"), "LEFT": ("right",)}  # of which sides an ON condition leaves rows out


@dataclass(frozen=True)
class Place:
    """Where a statement names a table of which it wants one SAE: bytes [start, end) of the text.

    `alias` is what must follow so that the name still holds; the SAE is given, or is the value of a parameter.
    """

    start: int
    end: int
    table: str
    alias: str
    sae: str | None
    parameter: str | None

    def subject(self, parameters: Parameters) -> object:
        """Return the SAE that is asked for, or anything else where the parameters do not say."""
        return self.sae if self.parameter is None else bound_value(self.parameter, parameters)


def bound_value(parameter: str, parameters: Parameters) -> object:
    """Return the value of `$name`, or of the `?` of that number, None where there is none."""
    if isinstance(parameters, Mapping):
        return parameters.get(parameter)
    place = int(parameter) if parameter.isdecimal() else 0
    return parameters[place - 1] if parameters and 0 < place <= len(parameters) else None


def find_places(text: str, nodes: Sequence[Node], tables: Collection[str]) -> tuple[Place, ...]:
    """Return where `tables` are named and a condition says of which SAE; `nodes` are all nodes of the statement."""
    ctes = {str(entry["key"]).lower() for node in nodes for entry in _ctes(node)}
    qualified = any(len(node["column_names"]) > 2 for node in nodes if node.get("class") == "COLUMN_REF")
    names = {table for table in tables if table not in ctes}
    if qualified or not names:
        return ()
    kept = _kept_as_spelled(nodes)
    selects = [node for node in nodes if _is_select(node) and not (node["sample"] or id(node) in kept)]
    return tuple(place for node in selects for place in _places_of(text.encode(), node, names))


def narrow(text: str, places: Iterable[Place], parameters: Parameters, query: Callable[[str, str], str | None]) -> str:
    """Return the statement with `query(table, sae)` at every place where there is one."""
    spelled = text.encode()
    for place in sorted(places, key=lambda place: place.start, reverse=True):
        sae = place.subject(parameters)
        found = query(place.table, sae) if isinstance(sae, str) else None
        if found is not None:
            spelled = spelled[: place.start] + f"({found}){place.alias}".encode() + spelled[place.end :]
    return spelled.decode()


def _kept_as_spelled(nodes: Sequence[Node]) -> set[int]:
    """Return the identities of nodes whose text must stay: a column without a name is called by the text of its item.

    With it stays every expression that may have to equal such an item: of groups and orders, for instance. What the
    columns of a subquery within an expression are called is never seen.
    """
    unseen = {id(node["subquery"]["node"]) for node in nodes if node.get("class") == "SUBQUERY"}
    seen = [node for node in nodes if _is_select(node) and id(node) not in unseen]
    items = [item for node in seen for item in node["select_list"] if not item["alias"]]
    if not any(_is_select(node) for item in items for node in below(item)):
        return set()
    return {id(one) for node in nodes if "modifiers" in node for name in _ITEMS for one in below(node.get(name))}


def _is_select(node: Node) -> bool:
    return node.get("type") == "SELECT_NODE"


def _places_of(text: bytes, select: Node, names: Collection[str]) -> Iterator[Place]:
    found = dict(_conditions(select["from_table"]))
    tables = _tables(select["from_table"])
    if tables is None:
        return
    alone = len(tables) == 1
    wanted = {**found, **_subjects(select["where_clause"])}
    for name, table in tables.items():
        said = wanted.get(name) or (wanted.get("") if alone else None)
        if said is not None and table.get("type") == "BASE_TABLE":
            yield from _place(text, table, said, names)


def _place(text: bytes, table: Node, said: Node, names: Collection[str]) -> Iterator[Place]:
    path = table["qualified_name"]["path"]
    name = str(path[-1]).lower()
    start = int(table["query_location"])
    end = start + len(name)
    plain = len(path) == 1 and name in names and text[start:end].lower() == name.encode()
    if plain and not (table["sample"] or table["at_clause"] or table["column_name_alias"]):
        alias = "" if table["alias"] else f" AS {quote_name(name)}"
        literal = said.get("literal", {}).get("text")
        yield Place(start, end, name, alias, literal, said.get("identifier"))


def _tables(source: Node) -> dict[str, Node] | None:
    """Return what a FROM names by how columns are qualified with it, None for joins that keep or pair rows alone."""
    if source["type"] != "JOIN":
        name = source["alias"] or (source["qualified_name"]["path"][-1] if source["type"] == "BASE_TABLE" else "")
        return {str(name).lower(): source}
    if source["join_type"] not in _JOINS or source["ref_type"] not in ("REGULAR", "CROSS"):
        return None
    left, right = _tables(source["left"]), _tables(source["right"])
    if left is None or right is None or left.keys() & right.keys():
        return None
    return {**left, **right}


def _conditions(source: Node) -> Iterator[tuple[str, Node]]:
    """Yield the tables that a join's condition restricts, with what it says of their SAE."""
    if source["type"] != "JOIN" or source["join_type"] not in _JOINS:
        return
    for side in ("left", "right"):
        yield from _conditions(source[side])
    restricted = {name for side in _JOINS[source["join_type"]] for name in _tables(source[side]) or ()}
    yield from ((name, said) for name, said in _subjects(source["condition"]).items() if name in restricted)


def _subjects(condition: Node | None) -> dict[str, Node]:
    """Return by table (empty: not said) the constant or parameter that a condition wants its SAE to be."""
    found = {}
    for one in _conjuncts(condition):
        if one["type"] == "COMPARE_EQUAL":
            for column, value in ((one["left"], one["right"]), (one["right"], one["left"])):
                if _is_subject(column) and _is_text(value):
                    names = column["column_names"]
                    found[str(names[0]).lower() if len(names) == 2 else ""] = value
    return found


def _conjuncts(condition: Node | None) -> Iterator[Node]:
    if condition and condition["type"] == "CONJUNCTION_AND":
        for child in condition["children"]:
            yield from _conjuncts(child)
    elif condition:
        yield condition


def _is_subject(node: Node) -> bool:
    return node["class"] == "COLUMN_REF" and str(node["column_names"][-1]).lower() == SUBJECT


def _is_text(node: Node) -> bool:
    return node["class"] == "PARAMETER" or bool(node["class"] == "CONSTANT" and node["literal"]["kind"] == "STRING")


def _ctes(node: Node) -> Sequence[Node]:
    held = node.get("cte_map")
    found: Sequence[Node] = held["map"] if isinstance(held, dict) else []
    return found
