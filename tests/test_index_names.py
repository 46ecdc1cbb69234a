"""Names, types and rows of an answer are those of the statement as it was written, whatever is executed instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from index_support import HALF, WIDE, FakeSource

from actstore.index import Connection, SqlFunction, build_index, open_index, plain_connection, read_catalog

MARK = SqlFunction("mark", lambda rows: pa.array([f"<{row}>" for row in rows.to_pylist()]), ("BIGINT",), "VARCHAR")
ONE = f"sae = '{HALF}'"
OTHER = f"sae = '{WIDE}'"
IN_ORDER = "ORDER BY a.row LIMIT 3"
MARKED = f"FROM activations a WHERE a.{ONE} AND a.feature = 1 {IN_ORDER}"

# Alike whether the table that is narrowed has a name of its own, is one of several, or stands deep within.
NARROWED = {
    "columns": f"SELECT row, feature FROM activations WHERE {ONE} ORDER BY ALL",
    "a star": f"SELECT * FROM features WHERE {ONE} ORDER BY feature",
    "a star of a table": f"SELECT features.* FROM features WHERE {ONE} ORDER BY feature",
    "a star of another name": f"SELECT f.*, f.sae AS again FROM features f WHERE f.{ONE} ORDER BY feature",
    "FROM first": f"FROM examples WHERE {ONE} ORDER BY ALL",
    "a whole row": f"SELECT features FROM features WHERE {ONE} ORDER BY feature LIMIT 3",
    "a whole row of another name": f"SELECT f FROM Features f WHERE F.{ONE} ORDER BY f.feature LIMIT 3",
    "a qualified column": f"SELECT activations.row + 1 FROM activations WHERE activations.{ONE} ORDER BY ALL",
    "other letters": f"SELECT Activations.ROW, Sae FROM Activations WHERE {ONE} ORDER BY ALL",
    "chosen columns": f"SELECT COLUMNS('.*e$') FROM features WHERE {ONE} ORDER BY ALL",
    "a function of chosen columns": f"SELECT max(COLUMNS('^m.*n$|feature')) FROM features WHERE {ONE}",
    "without and replaced": f"SELECT * EXCLUDE (histogram) REPLACE (feature + 1 AS feature) FROM features WHERE {ONE} "
    "ORDER BY 2",
    "aggregates": f"SELECT count(*), max(activation), sum(row) FROM activations WHERE {ONE}",
    "quoted names": f'SELECT "row" AS "a ""b"" ", feature "Feature" FROM activations "A" WHERE "A".{ONE} ORDER BY ALL',
    "comments": f"SELECT /* é 🐈 */ count(*) -- activations\nFROM /* activations */ activations -- x\nWHERE {ONE}",
    "a group by its expression": f"SELECT feature % 3, count(*) FROM examples WHERE {ONE} GROUP BY feature % 3 "
    "ORDER BY ALL",
    "groups of all": f"SELECT feature, count(*) FROM examples WHERE {ONE} GROUP BY ALL HAVING count(*) > 1 "
    "ORDER BY ALL",
    "grouping sets": f"SELECT feature % 2, row % 2, count(*) FROM activations WHERE {ONE} "
    "GROUP BY CUBE (feature % 2, row % 2) ORDER BY ALL",
    "windows": f"SELECT feature, rank() OVER (ORDER BY n_firings DESC, feature) FROM features WHERE {ONE} ORDER BY ALL",
    "a named window": f"SELECT sum(n_firings) OVER w FROM features WHERE {ONE} WINDOW w AS (ORDER BY feature) "
    "ORDER BY ALL",
    "of a window, some": f"SELECT feature, row FROM activations WHERE {ONE} QUALIFY row_number() OVER "
    "(PARTITION BY feature ORDER BY row) = 1 ORDER BY ALL",
    "distinct": f"SELECT DISTINCT feature, row % 3 FROM activations WHERE {ONE} ORDER BY ALL",
    "distinct on": f"SELECT DISTINCT ON (feature) feature, row FROM activations WHERE {ONE} ORDER BY feature, row",
    "a join": f"SELECT * FROM activations a JOIN tokens t USING (row) WHERE a.{ONE} ORDER BY ALL LIMIT 9",
    "the left of a join": f"SELECT * FROM features f LEFT JOIN examples e ON e.feature = f.feature AND e.{OTHER} "
    "ORDER BY ALL LIMIT 99",
    "a comma": f"SELECT f.feature, g.feature FROM features f, features g WHERE f.{ONE} AND g.{OTHER} "
    "AND f.feature = g.feature ORDER BY ALL",
    "two SAEs of one name": f"SELECT (SELECT count(*) FROM features f WHERE f.{ONE}) AS n, count(*) FROM features f "
    f"WHERE f.{OTHER}",
    "lateral": "SELECT feature, n FROM saes s, LATERAL (SELECT feature, count(*) AS n FROM examples e WHERE "
    f"e.{ONE} AND e.sae = s.sae GROUP BY feature) ORDER BY ALL",
    "nested": f"SELECT * FROM (SELECT count(*), max(row) FROM (FROM activations WHERE {ONE}))",
    "of a subquery, its columns": f"SELECT x, n FROM (SELECT feature, count(*) FROM examples WHERE {ONE} GROUP BY 1) "
    "AS q(x, n) ORDER BY ALL",
    "WITH": f"WITH w AS (SELECT feature, max(row) FROM activations WHERE {ONE} GROUP BY 1) "
    "SELECT * FROM w ORDER BY ALL",
    "WITH, made once": f"WITH w(f) AS MATERIALIZED (SELECT feature FROM features WHERE {ONE}) "
    "SELECT a.f, b.f FROM w a JOIN w b USING (f) ORDER BY ALL",
    "WITH, of itself": "WITH RECURSIVE r(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM r WHERE n < "
    f"(SELECT max(feature) FROM examples WHERE {ONE})) SELECT max(n), count(*) FROM r",
    "a union": f"SELECT count(*) FROM features WHERE {ONE} UNION ALL SELECT max(row) FROM examples WHERE {OTHER} "
    "ORDER BY 1",
    "a union by name": f"SELECT feature, row FROM examples WHERE {ONE} UNION ALL BY NAME SELECT feature, sae "
    f"FROM features WHERE {OTHER} ORDER BY ALL",
    "except": f"SELECT feature FROM features WHERE {ONE} EXCEPT SELECT feature FROM examples WHERE {ONE} ORDER BY ALL",
    "intersect": f"(SELECT feature FROM features WHERE {ONE}) INTERSECT (SELECT feature FROM features WHERE {OTHER}) "
    "ORDER BY ALL",
    "a condition": f"SELECT row FROM tokens WHERE row IN (SELECT row FROM activations WHERE {ONE}) ORDER BY ALL",
    "a condition that asks for none": f"SELECT row + 1 FROM tokens t WHERE NOT EXISTS (SELECT 1 FROM activations a "
    f"WHERE a.{ONE} AND a.feature = 3 AND a.row = t.row) ORDER BY ALL",
    "a subquery that is called": f"SELECT (SELECT max(row) FROM activations WHERE {ONE}) AS last, "
    f"EXISTS (SELECT 1 FROM examples WHERE {OTHER} AND feature = 1) AS there",
    "grouped by a subquery that is called": f"SELECT (SELECT max(row) FROM activations WHERE {ONE}) AS n, count(*) "
    f"FROM saes GROUP BY (SELECT max(row) FROM activations WHERE {ONE})",
    "so many": f"SELECT row FROM tokens ORDER BY row LIMIT (SELECT count(*) FROM features WHERE {ONE} AND feature < 5)",
    "so many, if any": "SELECT row FROM tokens ORDER BY row LIMIT (SELECT CASE WHEN EXISTS (FROM features "
    f"WHERE {ONE}) THEN 4 END)",
    "values": f"VALUES ((SELECT max(row) FROM activations WHERE {ONE})), (1)",
    "a range": f"SELECT * FROM range((SELECT max(feature) FROM examples WHERE {ONE}))",
    "unnested": f"SELECT * FROM unnest([1, (SELECT max(feature) FROM examples WHERE {ONE})])",
    "a pivot": f"SELECT * FROM (SELECT feature, row % 2 AS odd FROM examples WHERE {ONE}) "
    "PIVOT (count(*) FOR odd IN (0, 1)) ORDER BY ALL",
    "described": f"DESCRIBE SELECT *, count(*) OVER () FROM features WHERE {ONE}",
    "summarised": f"SUMMARIZE SELECT feature, row FROM examples WHERE {ONE}",
    "the first of an order, marked": f"SELECT a.row, round(a.activation, 1), mark(a.row) AS Example {MARKED}",
    "a constant, marked": f"SELECT 'x' AS one, a.row + 1, a.row + 2, mark(a.row) AS m {MARKED}",
}

# A subquery whose column has no name is called by its text: that stays as it is, and with it what must equal it.
NAMED_BY_THEIR_TEXT = {
    "exists": f"SELECT EXISTS (SELECT 1 FROM features WHERE {ONE} AND feature = 1)",
    "a scalar": f"SELECT (SELECT max(activation) FROM activations WHERE {ONE})",
    "one among others": f"SELECT count(*), (SELECT max(row) FROM activations WHERE {ONE}) + 1, 3 AS n FROM saes",
    "within a function": f"SELECT coalesce((SELECT max(row) FROM activations WHERE {ONE}), 0) FROM saes",
    "is in": f"SELECT row, row IN (SELECT row FROM activations WHERE {ONE}) FROM tokens ORDER BY ALL",
    "of a row": "SELECT feature, (SELECT count(*) FROM examples e WHERE e.feature = f.feature AND "
    f"e.{OTHER}) FROM features f WHERE f.{ONE} ORDER BY ALL",
    "within another": f"SELECT (SELECT (SELECT max(row) FROM activations WHERE {ONE}))",
    "within a query": f"SELECT * FROM (SELECT EXISTS (FROM features WHERE {ONE}), 1 AS n)",
    "within WITH": f"WITH w AS (SELECT (SELECT max(row) FROM activations WHERE {ONE})) SELECT * FROM w",
    "within a union": f"SELECT 1 UNION ALL SELECT EXISTS (FROM features WHERE {ONE})::INT ORDER BY 1",
    "the first of a union": f"SELECT EXISTS (FROM features WHERE {ONE})::INT UNION SELECT 5 ORDER BY 1",
    "a whole row of it": f"SELECT q AS r FROM (SELECT EXISTS (FROM features WHERE {ONE})) q",
    "a list": f"SELECT ARRAY (SELECT feature FROM features WHERE {ONE} ORDER BY feature)",
    "a struct": f"SELECT {{'a': (SELECT max(row) FROM activations WHERE {ONE})}}",
    "grouped": f"SELECT (SELECT max(row) FROM activations WHERE {ONE}), count(*) FROM saes "
    f"GROUP BY (SELECT max(row) FROM activations WHERE {ONE})",
    "ordered": f"SELECT DISTINCT (SELECT max(row) FROM activations WHERE {ONE}) FROM saes "
    f"ORDER BY (SELECT max(row) FROM activations WHERE {ONE})",
    "restricted by itself": f"SELECT (SELECT max(row) FROM activations WHERE {ONE}) FROM saes "
    f"GROUP BY ALL HAVING (SELECT max(row) FROM activations WHERE {ONE}) > 1",
    "described": f"DESCRIBE SELECT EXISTS (FROM features WHERE {ONE})",
}

AS_WRITTEN = {
    "a name before": f"SELECT n: count(*) FROM x: activations WHERE x.{ONE}",
    "a natural join": f"SELECT * FROM features NATURAL JOIN saes WHERE features.{ONE} ORDER BY feature LIMIT 9",
    "a positional join": f"SELECT * FROM features f POSITIONAL JOIN saes s WHERE s.{ONE}",
    "a join whose both sides stay": f"SELECT f.*, e.row FROM features f FULL JOIN examples e ON e.feature = f.feature "
    f"AND e.{ONE} AND f.{ONE} ORDER BY ALL LIMIT 40",
    "an as-of join": f"SELECT * FROM examples a ASOF JOIN predictions p ON a.row >= p.row WHERE a.{ONE} ORDER BY ALL",
    "a quoted table": f'SELECT count(*) FROM "activations" WHERE {ONE}',
    "another relation of this name": f"WITH features AS (SELECT 'half-sae' AS sae) SELECT *, 1 FROM features "
    f"WHERE {ONE}",
    "not said of one": f"SELECT sae, count(*) FROM features WHERE {ONE} OR feature = 3 GROUP BY ALL ORDER BY ALL",
}

# Names that a query over the answer would not keep, beside a function that could be called late.
NAMED_TWICE = {
    "two constants": f"SELECT 1, 1, mark(a.row) AS m {MARKED}",
    "two expressions": f"SELECT a.row + 1, a.ROW+1, mark(a.row) AS m {MARKED}",
    "a constant and a name": f'SELECT 1, a.row AS "1", mark(a.row) AS m {MARKED}',
    "an expression and a name": f'SELECT a.row + 1, a.feature AS "(a.""row"" + 1)", mark(a.row) AS m {MARKED}',
    "one name of several columns": f"SELECT COLUMNS('^(row|feature)$') + 1 AS x, mark(a.row) AS m {MARKED}",
    "parts of a struct": f"SELECT unnest({{'x': 1, 'y': 2}}), a.row AS x, mark(a.row) AS m {MARKED}",
    "a parameter": f"SELECT 'a'::VARCHAR, 'a'::VARCHAR, mark(a.row) AS m {MARKED}",
}
ALL = {
    f"{kind}: {name}": text
    for kind, texts in {
        "narrowed": NARROWED,
        "written": AS_WRITTEN,
        "text": NAMED_BY_THEIR_TEXT,
        "twice": NAMED_TWICE,
    }.items()
    for name, text in texts.items()
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("index")
    source = FakeSource()
    for shards in ((0,), (1, 3)):  # two parts of each SAE
        source.extract(*shards)
        build_index(source, directory)
    return directory


@pytest.fixture(scope="module")
def connection(directory: Path) -> Iterator[Connection]:
    with open_index(read_catalog(directory), lambda name: directory / name, functions=[MARK], threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(directory: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The same tables, whose statements DuckDB sees as they are."""
    with plain_connection(read_catalog(directory), lambda name: directory / name, functions=[MARK]) as opened:
        opened.execute("SET threads = 1")
        yield opened


def answer(connection: Connection, text: str, parameters: Any = None) -> pa.Table:
    with connection.stream(text, parameters) as reader:
        return reader.read_all()


@pytest.mark.parametrize("text", ALL.values(), ids=ALL)
def test_names_types_and_rows_are_those_of_the_statement(
    text: str, connection: Connection, plain: duckdb.DuckDBPyConnection
) -> None:
    expected = plain.sql(text).to_arrow_table()
    found = answer(connection, text)
    assert found.schema == expected.schema
    assert [column.to_pylist() for column in found.columns] == [column.to_pylist() for column in expected.columns]
    assert found.num_rows > 0


@pytest.mark.parametrize("text", NARROWED.values(), ids=NARROWED)
def test_each_of_these_is_executed_as_another(text: str, connection: Connection) -> None:
    checked = connection._checked(text)
    assert connection._narrow(checked, None)[0] != text


@pytest.mark.parametrize("text", [NAMED_BY_THEIR_TEXT["exists"], NAMED_BY_THEIR_TEXT["grouped"]])
def test_a_bound_sae_changes_no_name(text: str, connection: Connection, plain: duckdb.DuckDBPyConnection) -> None:
    text = text.replace(f"'{HALF}'", "$s")
    for sae in (HALF, WIDE, "none"):
        expected = plain.sql(text, params={"s": sae}).to_arrow_table()
        assert answer(connection, text, {"s": sae}).equals(expected)


def test_only_what_must_keep_its_text_does(connection: Connection) -> None:
    text = f"SELECT EXISTS (FROM features WHERE {ONE}), max(row) FROM activations WHERE {OTHER} GROUP BY ALL"
    (place,) = connection._checked(text).places
    assert (place.table, place.sae) == ("activations", WIDE)


def test_functions_are_called_late_unless_names_would_change(connection: Connection) -> None:
    is_late = {name: connection._checked(text).text != text for name, text in ALL.items() if "mark(" in text}
    assert is_late == {name: name.startswith("narrowed") for name in is_late} and len(is_late) == 9
