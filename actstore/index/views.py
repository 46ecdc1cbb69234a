"""The views of a reading connection: every table of the contract, over the parts that exist.

Parts are attached under aliases. The part's subject becomes a constant column of its branch, by which the planner
leaves whole parts out; half codes are decoded outside of the union, where it is done once (planning 26 SAEs: 2 ms
against 9 ms inside of every branch).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actstore.blocks import HEAD_METRICS

from .attention_parts import UNITS
from .catalog import Part
from .schema import PART_TABLES, SUBJECT_COLUMNS, TABLES, Columns, quote_name, quote_text

__all__ = ["LABELS", "coded_query", "firings_query", "view_queries"]

LABELS = "internal.labels"

# The value of an IEEE half: subnormal m·2⁻²⁴, otherwise (1024 + m)·2^(e−25); both are exact integers times 2⁻²⁵.
_DECODED = """CAST(CASE WHEN activation < 1024 THEN activation::BIGINT * 2
    ELSE ((activation & 1023) + 1024)::BIGINT << (activation >> 10) END / 33554432.0::DOUBLE AS FLOAT)"""

Attached = Sequence[tuple[str, Part]]  # alias, part


def view_queries(attached: Attached) -> Mapping[str, str]:
    """Return the query of every table of the contract, by its name."""
    apart = ("activations", "features", "heads")
    queries = {table: _table_query(table, attached) for table in TABLES if table not in apart}
    queries["heads"] = _heads_query(attached)
    firings = firings_query(attached)
    queries["activations"] = (
        f"SELECT sae, feature, row, activation FROM ({firings})" if firings else _empty("activations")
    )
    features = _table_query("features", attached, without=("label",))
    queries["features"] = f"SELECT * FROM ({features}) LEFT JOIN {LABELS} USING (sae, feature)"
    return queries


def firings_query(attached: Attached) -> str:
    """Return a query for sae, feature, row, activation (FLOAT), plain over firings parts; empty without any."""
    halves = coded_query([(alias, part) for alias, part in attached if part.facts.get("activation") == "half"])
    floats = coded_query([(alias, part) for alias, part in attached if part.facts.get("activation") == "float"])
    decoded = f"SELECT sae, feature, row, {_DECODED} AS activation, plain FROM ({halves})" if halves else ""
    return _union([query for query in (decoded, floats) if query])


def coded_query(attached: Attached) -> str:
    """Return as `firings_query`, with activations as the parts store them; all must store them alike."""
    columns = ("sae", *PART_TABLES["firings"]["firings"])
    return _union([_branch(alias, part, "firings", columns) for alias, part in attached])


def _table_query(table: str, attached: Attached, without: tuple[str, ...] = ()) -> str:
    columns = [column for column in TABLES[table] if column not in without]
    branches = [_branch(alias, part, table, columns) for alias, part in attached if table in PART_TABLES[part.kind]]
    return _union(branches) or _empty(table, without)


def _heads_query(attached: Attached) -> str:
    """Return the means of every head over the sums of all parts; NULL where no plain row has a number."""
    columns = ("layer", *PART_TABLES["attention"]["head_sums"])
    branches = [_branch(alias, part, "head_sums", columns) for alias, part in attached if part.kind == "attention"]
    if not branches:
        return _empty("heads")
    means = ", ".join(_mean(metric) for metric in HEAD_METRICS)
    return f"SELECT layer, head, {means} FROM ({_union(branches)}) GROUP BY layer, head"


def _mean(metric: str) -> str:
    chosen = f"FILTER (metric = {quote_text(metric)})"
    return f"sum(total) {chosen}::DOUBLE / {UNITS} / nullif(sum(n) {chosen}, 0)::DOUBLE AS {metric}"


def _branch(alias: str, part: Part, table: str, columns: Sequence[str]) -> str:
    kinds = SUBJECT_COLUMNS.get(part.kind, {})
    values = part.subject.split("/") if kinds else ()
    pairs = zip(kinds.items(), values, strict=True)
    literals = {name: f"{quote_text(value)}::{kind}" for (name, kind), value in pairs}
    listed = (f"{literals[column]} AS {column}" if column in literals else quote_name(column) for column in columns)
    return f"SELECT {', '.join(listed)} FROM {alias}.{table}"


def _union(queries: Sequence[str]) -> str:
    return " UNION ALL ".join(queries)


def _empty(table: str, without: tuple[str, ...] = ()) -> str:
    columns: Columns = TABLES[table]
    listed = ", ".join(f"NULL::{kind} AS {quote_name(name)}" for name, kind in columns.items() if name not in without)
    return f"SELECT {listed} WHERE false"
