"""The views of a reading connection: every table of the contract, over the parts that exist.

Parts are attached under aliases. The part's subject becomes a constant column of its branch, by which the planner
leaves whole parts out; half codes are decoded outside of the union, where it is done once (planning 26 SAEs: 2 ms
against 9 ms inside of every branch).
"""

from __future__ import annotations

from collections.abc import Sequence

from actstore.blocks import HEAD_METRICS

from .attention_parts import UNITS
from .catalog import Part
from .schema import PART_TABLES, SUBJECT_COLUMNS, TABLES, Columns, quote_name, quote_text

__all__ = ["LABELS", "NARROWED", "Attached", "coded_query", "firings_query", "of_sae", "view_query"]

LABELS = "internal.labels"
# Tables whose parts are of one SAE each.
NARROWED = ("activations", "features", "examples", "feature_logits", "reconstruction")

# The value of an IEEE half: subnormal m·2⁻²⁴, otherwise (1024 + m)·2^(e−25); both are exact integers times 2⁻²⁵.
_DECODED = """CAST(CASE WHEN activation < 1024 THEN activation::BIGINT * 2
    ELSE ((activation & 1023) + 1024)::BIGINT << (activation >> 10) END / 33554432.0::DOUBLE AS FLOAT)"""

_SAE = {"sae": "VARCHAR"}  # the subject of such a part

Attached = Sequence[tuple[str, Part]]  # alias, part


def view_query(table: str, attached: Attached, *, labelled: bool) -> str:
    """Return the query of a table of the contract, with all of its columns in their order.

    Where nothing is `labelled`, labels are not looked for.
    """
    listed = ", ".join(map(quote_name, TABLES[table]))
    return f"SELECT {listed} FROM ({_query(table, attached, labelled)})"


def _query(table: str, attached: Attached, labelled: bool) -> str:
    if table == "heads":
        return _heads_query(attached)
    if table == "activations":
        return firings_query(attached) or _empty(table)
    if table == "features":
        features = _table_query(table, attached, without=("label",))
        if not labelled:
            return f"SELECT *, NULL::VARCHAR AS label FROM ({features})"
        return f"SELECT * FROM ({features}) LEFT JOIN {LABELS} USING (sae, feature)"
    return _table_query(table, attached)


def firings_query(attached: Attached) -> str:
    """Return a query for sae, feature, row, activation (FLOAT), plain over firings parts; empty without any."""
    halves = coded_query([(alias, part) for alias, part in attached if part.facts.get("activation") == "half"])
    floats = coded_query([(alias, part) for alias, part in attached if part.facts.get("activation") == "float"])
    decoded = f"SELECT sae, feature, row, {_DECODED} AS activation, plain FROM ({halves})" if halves else ""
    return _union([query for query in (decoded, floats) if query])


def of_sae(attached: Attached, sae: str) -> Attached:
    """Return the parts that hold an SAE's share of the tables `NARROWED`."""
    return [(alias, part) for alias, part in attached if SUBJECT_COLUMNS.get(part.kind) == _SAE and part.subject == sae]


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
