"""Answers of few rows: which statements keep few, and that no answer is another for being fetched as values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from index_support import HALF, FakeSource

from actstore.errors import InvalidInput, QueryError, explain
from actstore.index import Connection, SqlFunction, build_index, open_index, read_catalog
from actstore.index.few import FEW, few_rows, keeps_few, limit_of
from actstore.index.statements import check_statement


def refused(rows: pa.Array) -> pa.Array:
    raise InvalidInput(explain(f"No row is wanted, not even {rows[0]}"))


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    directory = tmp_path_factory.mktemp("index")
    source = FakeSource()
    source.extract(0, 1)
    build_index(source, directory)
    function = SqlFunction("refused", refused, ("BIGINT",), "BIGINT")
    with open_index(read_catalog(directory), lambda name: directory / name, functions=[function]) as opened:
        yield opened


KEEPS_FEW: dict[str, tuple[str, Any]] = {
    "a number": ("SELECT 1 LIMIT 20", None),
    "no row": ("SELECT 1 LIMIT 0", None),
    "the most": (f"SELECT 1 LIMIT {FEW}", None),
    "by name": ("SELECT 1 LIMIT $k", {"k": 3}),
    "by place": ("SELECT ? LIMIT ?", [10_000, 3]),
    "an order": ("SELECT row FROM tokens ORDER BY row LIMIT 5 OFFSET 100000", None),
    "a union": ("(SELECT 1 UNION ALL SELECT 2) LIMIT 7", None),
    "after WITH": ("WITH a AS (SELECT 1) SELECT * FROM a LIMIT 9", None),
    "values": ("VALUES (1), (2) LIMIT 1", None),
}
MAY_KEEP_MANY: dict[str, tuple[str, Any]] = {
    "no limit": ("SELECT 1", None),
    "a larger one": (f"SELECT 1 LIMIT {FEW + 1}", None),
    "a larger one by name": ("SELECT 1 LIMIT $k", {"k": FEW + 1}),
    "a limit within": ("SELECT * FROM (SELECT 1 LIMIT 4), tokens", None),
    "a limit of WITH": ("WITH a AS (SELECT 1 LIMIT 1) SELECT * FROM a, tokens", None),
    "a share": ("SELECT * FROM tokens LIMIT 10%", None),
    "an expression": ("SELECT 1 LIMIT 2 + 3", None),
    "a subquery": ("SELECT 1 LIMIT (SELECT 3)", None),
    "NULL": ("SELECT 1 LIMIT NULL", None),
    "NULL by name": ("SELECT 1 LIMIT $k", {"k": None}),
    "a text": ("SELECT 1 LIMIT $k", {"k": "3"}),
    "a name that is not given": ("SELECT 1 LIMIT $k", {}),
    "an offset alone": ("SELECT 1 OFFSET 3", None),
    "explained": ("EXPLAIN SELECT 1 LIMIT 3", None),
}


def is_few(text: str, parameters: Any) -> bool:
    with duckdb.connect() as parser:
        return keeps_few(limit_of(check_statement(parser, text).select), parameters)


@pytest.mark.parametrize("name", KEEPS_FEW)
def test_a_statement_keeps_few_rows_where_its_own_limit_says_so(name: str) -> None:
    assert is_few(*KEEPS_FEW[name])


@pytest.mark.parametrize("name", MAY_KEEP_MANY)
def test_every_other_statement_may_keep_many(name: str) -> None:
    assert not is_few(*MAY_KEEP_MANY[name])


VALUES = {
    "whole numbers": "SELECT 1::TINYINT, -2::SMALLINT, 3::INTEGER, 4::BIGINT",
    "whole numbers without sign": "SELECT 255::UTINYINT, 2::USMALLINT, 3::UINTEGER, 18446744073709551615::UBIGINT",
    "fractions": "SELECT 0.1::FLOAT AS f, 0.1::DOUBLE AS d, 1e-45::FLOAT AS least",
    "fractions that are none": "SELECT 'nan'::FLOAT AS a, '-inf'::DOUBLE AS b, -0.0::DOUBLE AS c",
    "texts": "SELECT '' AS a, 'é🐈' AS b, chr(0) || 'x' AS c, true AS d",
    "NULL of a type": "SELECT NULL::FLOAT AS a, NULL::VARCHAR AS b, NULL::BIGINT AS c",
    "some NULL": "SELECT CASE WHEN row % 2 = 0 THEN row END AS a, nullif(token, 'x') AS b FROM tokens",
    "no rows": "SELECT row, token FROM tokens WHERE row < 0",
    "one name twice": "SELECT row, pos AS row FROM tokens",
    "firings": "SELECT * FROM activations ORDER BY ALL",
    # What DuckDB has to encode.
    "NULL of no type": "SELECT NULL AS a",
    "lists": "SELECT [row] AS a, {'x': row} AS b FROM tokens",
    "JSON": "SELECT metadata FROM documents",
    "decimals": "SELECT sum(row) AS a, 1.50::DECIMAL(4, 2) AS b FROM tokens",
    "times": "SELECT DATE '2026-01-02' AS a, TIMESTAMP '2026-01-02 03:04:05' AS b, INTERVAL 3 DAY AS c",
    "bytes": "SELECT 'abc'::BLOB AS a, 'a'::ENUM('a', 'b') AS b, uuid() IS NULL AS c",
}


@pytest.mark.parametrize("limit", [0, 7, FEW])
@pytest.mark.parametrize("name", VALUES)
def test_few_rows_are_what_a_stream_of_them_is(connection: Connection, name: str, limit: int) -> None:
    many = f"SELECT * FROM ({VALUES[name]}) LIMIT {limit}::BIGINT"  # a cast is not a number: streamed
    assert not is_few(many, None)
    wanted = connection.sql(many).table
    for _ in range(2):  # the second time it is known whether values will do
        found = connection.sql(f"SELECT * FROM ({VALUES[name]}) LIMIT {limit}").table
        assert found.schema == wanted.schema
        assert repr(found.to_pylist()) == repr(wanted.to_pylist())


def test_only_types_that_are_alike_are_fetched_as_values() -> None:
    with duckdb.connect() as plain:
        found = few_rows(plain.execute("SELECT 1 AS a, 'x' AS b, 0.5::FLOAT AS c LIMIT 1"))
        assert found is not None and found.to_pylist() == [{"a": 1, "b": "x", "c": 0.5}]
        assert few_rows(plain.execute("SELECT 1 AS a, [1] AS b LIMIT 1")) is None


def test_a_limit_of_the_caller_cuts_few_rows_too(connection: Connection) -> None:
    cut = connection.sql("SELECT row FROM tokens ORDER BY row LIMIT 9", limit=4)
    assert (cut.table["row"].to_pylist(), cut.truncated) == ([0, 1, 2, 3], True)
    whole = connection.sql("SELECT row FROM tokens ORDER BY row LIMIT 9", limit=9)
    assert (whole.table.num_rows, whole.truncated) == (9, False)


def test_few_rows_of_one_sae_are_narrowed_as_streams_are(connection: Connection) -> None:
    text = "SELECT feature, activation FROM activations WHERE sae = $sae ORDER BY ALL LIMIT $k"
    found = connection.sql(text, {"sae": HALF, "k": 5}).table
    streamed = connection.sql(text, {"sae": HALF, "k": FEW + 5}).table
    assert found.num_rows == 5 and found.equals(streamed.slice(0, 5))
    assert connection.sql(text, {"sae": "none", "k": 5}).table.num_rows == 0


def test_errors_are_the_same_for_few_rows(connection: Connection) -> None:
    with pytest.raises(InvalidInput, match="No row is wanted, not even 0"):
        connection.sql("SELECT refused(row) FROM tokens WHERE row = 0 LIMIT 1")
    with pytest.raises(QueryError, match="Could not convert string 'x'"):
        connection.sql("SELECT 'x'::INTEGER LIMIT 1")
    with pytest.raises(QueryError, match="missing"):
        connection.sql("SELECT 1 WHERE $missing LIMIT $k", {"k": 3})
    assert connection.sql("SELECT 1 AS one LIMIT 1").table.to_pylist() == [{"one": 1}]
