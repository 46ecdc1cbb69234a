"""Narrowing to one SAE: which tables of a statement are narrowed, and that no answer changes by it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from index_support import HALF, WIDE, FakeSource

from actstore.errors import QueryError
from actstore.index import Connection, SqlFunction, build_index, open_index, plain_connection, read_catalog
from actstore.index.narrowing import find_places, narrow
from actstore.index.statements import MAX_TEXT_BYTES, check_statement
from actstore.index.views import NARROWED

TWICE = SqlFunction("twice", lambda rows: pa.array([2 * row for row in rows.to_pylist()]), ("BIGINT",), "BIGINT")
LABELS = [(HALF, 3, "three"), (WIDE, 4, "vier")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("index")
    source = FakeSource()
    source.compute_logits(HALF)
    for shards in ((0,), (1, 3)):  # two parts of each SAE
        source.extract(*shards)
        build_index(source, directory)
    return directory


@pytest.fixture(scope="module")
def connection(directory: Path) -> Iterator[Connection]:
    catalog = read_catalog(directory)
    with open_index(catalog, lambda name: directory / name, functions=[TWICE], labels=LABELS, threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(directory: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The same tables, whose statements DuckDB sees as they are."""
    catalog = read_catalog(directory)
    with plain_connection(catalog, lambda name: directory / name, functions=[TWICE], labels=LABELS) as opened:
        yield opened


def narrowed(text: str, parameters: Any = None) -> list[tuple[str, str]]:
    """Return the tables that are narrowed, with the SAE of each, in the order of the text."""
    with duckdb.connect() as parser:
        statement = check_statement(parser, text)
    found: list[tuple[str, str]] = []

    def query(table: str, sae: str) -> str:
        found.append((table, sae))
        return f"query {table}"

    narrow(text, find_places(text, statement.nodes, NARROWED), parameters, query)
    return found[::-1]


IS_NARROWED = {
    "a constant": ("SELECT * FROM activations WHERE sae = 'x' AND row > 3", None, ["activations"]),
    "turned round": ("SELECT * FROM activations WHERE 'x' = sae", None, ["activations"]),
    "by name": ("SELECT * FROM examples e WHERE e.feature = $f AND e.sae = $s", {"s": "x", "f": 1}, ["examples"]),
    "by place": ("SELECT * FROM features WHERE feature = ? AND sae = ?", [3, "x"], ["features"]),
    "other letters": ("SELECT * FROM Activations A WHERE a.SAE = 'x'", None, ["activations"]),
    "after letters of more bytes": ("SELECT 'éß🐈', * FROM activations WHERE sae = 'x'", None, ["activations"]),
    "a join": ("SELECT * FROM activations a JOIN tokens USING (row) WHERE a.sae = 'x'", None, ["activations"]),
    "both of a join": (
        "SELECT * FROM examples e JOIN features f USING (feature) WHERE e.sae = 'x' AND f.sae = 'x'",
        None,
        ["examples", "features"],
    ),
    "the condition of a join": (
        "SELECT * FROM tokens t LEFT JOIN activations a ON a.sae = 'x' AND a.row = t.row",
        None,
        ["activations"],
    ),
    "within WITH, a union and a condition": (
        "WITH w AS (SELECT row FROM activations WHERE sae = 'x') SELECT row FROM w UNION ALL "
        "SELECT row FROM examples WHERE sae = 'x' AND row IN (SELECT row FROM reconstruction WHERE sae = 'x')",
        None,
        ["activations", "examples", "reconstruction"],
    ),
}
IS_LEFT_ALONE = {
    "no SAE is said": ("SELECT * FROM activations WHERE feature = 3", None),
    "one of several": ("SELECT * FROM activations WHERE sae = 'x' OR feature = 3", None),
    "not this one": ("SELECT * FROM activations WHERE NOT sae = 'x'", None),
    "after grouping": ("SELECT sae, count(*) FROM activations GROUP BY sae HAVING sae = 'x'", None),
    "NULL": ("SELECT * FROM activations WHERE sae = $s", {"s": None}),
    "another type": ("SELECT * FROM activations WHERE sae = ?", [3]),
    "nothing is bound": ("SELECT * FROM activations WHERE sae = ?", None),
    "whose column is not certain": (
        "SELECT 1 FROM activations a, (SELECT 'x' AS sae) o WHERE sae = 'x'",
        None,
    ),
    "the side that a LEFT JOIN keeps": (
        "SELECT * FROM activations a LEFT JOIN tokens t ON a.sae = 'x' AND a.row = t.row",
        None,
    ),
    "a FULL JOIN": ("SELECT * FROM activations a FULL JOIN tokens t ON a.row = t.row WHERE a.sae = 'x'", None),
    "a POSITIONAL JOIN": ("SELECT * FROM activations a POSITIONAL JOIN tokens WHERE a.sae = 'x'", None),
    "a sample of the table": ("SELECT * FROM activations TABLESAMPLE 10% WHERE sae = 'x'", None),
    "a sample of the query": ("SELECT * FROM activations WHERE sae = 'x' USING SAMPLE 10%", None),
    "other names of columns": ("SELECT * FROM activations a(sae, f) WHERE sae = 'x'", None),
    "another relation of this name": (
        "WITH activations AS (SELECT 'x' AS sae) SELECT * FROM activations WHERE sae = 'x'",
        None,
    ),
    "a column by its whole name": ("SELECT main.activations.row FROM activations WHERE sae = 'x'", None),
    "a quoted name": ("SELECT * FROM \"activations\" WHERE sae = 'x'", None),
}


@pytest.mark.parametrize(("text", "parameters", "tables"), IS_NARROWED.values(), ids=IS_NARROWED)
def test_tables_are_narrowed_where_a_condition_says_the_sae(text: str, parameters: Any, tables: list[str]) -> None:
    assert narrowed(text, parameters) == [(table, "x") for table in tables]


@pytest.mark.parametrize(("text", "parameters"), IS_LEFT_ALONE.values(), ids=IS_LEFT_ALONE)
def test_what_is_not_certain_to_mean_the_same_is_left_alone(text: str, parameters: Any) -> None:
    assert narrowed(text, parameters) == []


def test_a_narrowed_table_keeps_its_name() -> None:
    text = "SELECT activations.row FROM activations, examples e WHERE activations.sae = 'x' AND e.sae = 'x'"
    with duckdb.connect() as parser:
        places = find_places(text, check_statement(parser, text).nodes, NARROWED)
    found = narrow(text, places, None, lambda table, sae: f"{table} of {sae}")
    assert found.startswith('SELECT activations.row FROM (activations of x) AS "activations", (examples of x) e WHERE')


CONDITIONS = ["{t}.sae = $s", "$s = {t}.sae AND {t}.feature % 2 = 0", "{t}.sae <> $s", "({t}.sae = $s) IS NOT FALSE"]
SHAPES = [
    "SELECT o.* FROM {table} o WHERE {o} ORDER BY ALL",
    "SELECT * FROM {table} o JOIN features f USING (feature) WHERE {o} AND {f} ORDER BY ALL",
    "SELECT * FROM {table} o LEFT JOIN features f ON o.feature = f.feature AND {f} WHERE {o} ORDER BY ALL",
    "SELECT * FROM {table} o LEFT JOIN features f ON o.feature = f.feature AND {o} WHERE {f} ORDER BY ALL",
    "SELECT * FROM features f LEFT JOIN {table} o ON o.feature = f.feature WHERE {o} AND f.feature < 9 ORDER BY ALL",
    "SELECT * FROM features f RIGHT JOIN {table} o ON o.feature = f.feature AND {f} WHERE {o} ORDER BY ALL",
    "SELECT f.sae, (SELECT count(*) FROM {table} o WHERE o.feature = f.feature AND {o}) FROM features f ORDER BY ALL",
    "SELECT * FROM features f SEMI JOIN {table} o ON o.feature = f.feature AND {o} WHERE {f} ORDER BY ALL",
    "SELECT * FROM features f ANTI JOIN {table} o ON o.feature = f.feature AND {o} ORDER BY ALL",
    "SELECT o.*, twice(o.feature::BIGINT) AS t FROM {table} o WHERE {o} ORDER BY o.sae, o.feature, o.row LIMIT 7",
]


@pytest.mark.parametrize("shape", SHAPES)
def test_no_answer_changes(shape: str, connection: Connection, plain: duckdb.DuckDBPyConnection) -> None:
    tables = ("activations", "examples") if "LIMIT" in shape else ("examples", "feature_logits")
    saes = (HALF, WIDE, "none", None)
    for table, one, other, sae in itertools.product(tables, CONDITIONS, CONDITIONS[:1], saes):
        text = shape.format(table=table, o=one.format(t="o"), f=other.format(t="f"))
        expected = plain.execute(text, {"s": sae}).fetchall()
        answer = connection.sql(text, {"s": sae}).table
        columns = [column.to_pylist() for column in answer.columns]
        assert list(zip(*columns, strict=True)) == expected, (text, sae)


@pytest.mark.parametrize("sae", [HALF, WIDE])
@pytest.mark.parametrize("table", NARROWED)
def test_each_table_of_an_sae_is_the_same_narrowed(
    table: str, sae: str, connection: Connection, plain: duckdb.DuckDBPyConnection
) -> None:
    expected = plain.execute(f"SELECT * FROM {table} WHERE sae = ? ORDER BY ALL", [sae])
    kinds = [(column[0], str(column[1])) for column in plain.description or ()]
    rows = expected.fetchall()
    with connection.stream(f"SELECT * FROM {table} WHERE sae = ? ORDER BY ALL", [sae]) as reader:
        answer = reader.read_all()
    assert answer.column_names == [name for name, _ in kinds]
    assert list(zip(*(column.to_pylist() for column in answer.columns), strict=True)) == rows
    assert bool(rows) == (table != "feature_logits" or sae == HALF)
    whole = connection.sql(f"DESCRIBE SELECT * FROM {table}").table
    assert connection.sql(f"DESCRIBE SELECT * FROM {table} WHERE sae = ?", [sae]).table.equals(whole)


def test_a_text_that_would_become_too_long_is_asked_as_it_is(connection: Connection) -> None:
    text = f"SELECT count(*) AS n /* {'a' * (MAX_TEXT_BYTES - 90)} */ FROM activations WHERE sae = ?"
    assert len(text) < MAX_TEXT_BYTES < len(text) + 100
    short = connection.sql("SELECT count(*) AS n FROM activations WHERE sae = ?", [HALF])
    assert connection.sql(text, [HALF]).table.equals(short.table)


def test_nobody_but_narrowing_names_a_part(connection: Connection) -> None:
    for name in ("p0.store", "p5.firings", "internal.labels"):
        with pytest.raises(QueryError, match="There is no table"):
            connection.sql(f"SELECT * FROM {name}, activations WHERE activations.sae = ?", [HALF])
