"""The read path: what it answers, and what its errors say."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from index_sql_support import FUNCTIONS, built_index, connected
from index_support import HALF, WIDE, FakeSource

from actstore.errors import ActstoreError, QueryError, UnknownName
from actstore.index import Connection, open_index, plain_connection, read_catalog


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeSource, Path]:
    return built_index(tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def connection(index: tuple[FakeSource, Path]) -> Iterator[Connection]:
    with connected(index[1]) as opened:
        yield opened


def test_the_query_that_must_work_on_every_store(index: tuple[FakeSource, Path], connection: Connection) -> None:
    answer = connection.sql(
        f"""
        SELECT t.token, snippet(a.row, 10, 10) AS example, a.activation
        FROM activations a JOIN tokens t USING (row)
        WHERE a.sae = '{WIDE}' AND a.feature = 5
        ORDER BY a.activation DESC LIMIT 20;
        """
    )
    strongest = sorted((a for f, _, a, _ in index[0].all_firings(WIDE) if f == 5), reverse=True)[:20]
    assert answer.table["activation"].to_pylist() == strongest and not answer.truncated
    rows = {row for f, row, *_ in index[0].all_firings(WIDE) if f == 5}
    assert all(int(text.removesuffix("-10+10")) in rows for text in answer.table["example"].to_pylist())


@pytest.mark.parametrize(
    ("text", "parameters", "expected"),
    [
        ("SELECT count(*) FROM activations WHERE feature = ? AND row < ?", [-1, 10], 0),
        ("SELECT $a || $b", {"a": "it's", "b": "; DROP TABLE tokens"}, "it's; DROP TABLE tokens"),
        ("SELECT ?::VARCHAR", ["' OR 1=1 --"], "' OR 1=1 --"),
        ("SELECT len(?)", [[1, 2, 3]], 3),
        ("SELECT ? IS NULL", [None], True),
        ("SELECT seven()", None, 7),
        ("SELECT is_missing(NULL)", None, True),
        ("SELECT snippet(NULL, 1, 1)", None, None),
        ("SELECT pairs(1)", None, [{"a": 1, "b": 0.5}]),
    ],
)
def test_parameters_are_bound_and_functions_called(
    connection: Connection, text: str, parameters: object, expected: object
) -> None:
    assert connection.sql(text, parameters).table[0].to_pylist() == [expected]  # type: ignore[arg-type]


ACCEPTED = [
    "SELECT 1",
    "  -- a comment\n SELECT 1 /* another */ ;",
    "FROM tokens",
    "TABLE tokens",
    "VALUES (1), (2)",
    "WITH a AS (SELECT 1 AS x) SELECT * FROM a, A AS b",
    "WITH RECURSIVE r AS (SELECT 1 AS x UNION ALL SELECT x + 1 FROM r WHERE x < 3) FROM r",
    "SELECT * FROM main.tokens LIMIT 1",
    "SELECT * FROM Tokens ORDER BY row LIMIT 1",
    "SELECT (SELECT count(*) FROM sites), EXISTS (FROM saes)",
    "SELECT row FROM tokens UNION SELECT row FROM predictions",
    "SELECT * FROM range(3), unnest([1, 2])",
    "SELECT * FROM (PIVOT tokens ON is_special IN (true, false) USING count(*))",
    "SELECT [x + 1 FOR x IN [1, 2]], list_dot_product([1.0], [2.0])",
    "SELECT quantile_disc(activation, 0.5) OVER (PARTITION BY sae) FROM activations LIMIT 1",
    "DESCRIBE tokens",
    "DESCRIBE SELECT 1",
    "SUMMARIZE tokens",
    "SHOW TABLES",
    "EXPLAIN SELECT * FROM tokens",
    "\n explain\nanalyze /* why */ SELECT count(*) FROM tokens -- ;",
    "SELECT 'EXPLAIN; DROP VIEW tokens', $$; DROP VIEW tokens -- $$, $a$ $$ ; $a$ /* ; /* ; */ */",
    "/* /* */ DROP VIEW tokens; */ SELECT 1",
    'WITH "my rows" AS (FROM tokens), sqlite AS (SELECT 1) SELECT * FROM "my rows", sqlite',
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_reading_statements_are_answered(connection: Connection, text: str) -> None:
    assert connection.sql(text).table.num_rows > 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SELECT sum(x) AS s FROM (VALUES (1), (2)) t(x)", (pa.int64(), [3])),
        ("SELECT (-9223372036854775808)::HUGEINT AS s", (pa.int64(), [-(1 << 63)])),
        ("SELECT 9223372036854775808::HUGEINT AS s", (pa.decimal128(38, 0), [Decimal(1 << 63)])),
        ("SELECT NULL::HUGEINT AS s", (pa.int64(), [None])),
        ("SELECT 1.5::DECIMAL(4, 1) AS s", (pa.decimal128(4, 1), [Decimal("1.5")])),
    ],
)
def test_whole_decimals_that_fit_are_integers(
    connection: Connection, text: str, expected: tuple[pa.DataType, list[object]]
) -> None:
    table = connection.sql(text).table
    assert (table.schema.field("s").type, table["s"].to_pylist()) == expected


@pytest.mark.parametrize(
    ("text", "parameters", "said"),
    [
        ("SELEC 1", None, 'syntax error at or near "SELEC"'),
        ("SELECT * FROM activation", None, "There is no table 'activation'. Did you mean 'activations'?"),
        ("SELECT * FROM nowhere", None, "Accepted: store, passes, documents"),
        ("SELECT featur FROM activations", None, 'Candidate bindings: "feature"'),
        ("SELECT snipet(1, 2, 3)", None, 'Did you mean "snippet"'),
        ("SELECT 'a'::INTEGER", None, "Could not convert string 'a' to INT32"),
        ("SELECT ?", None, "Values were not provided"),
        ("SELECT $a", {"b": 1}, "Values were not provided"),
        ("SELECT ?", [object()], "object"),
        ("INSERT INTO tokens VALUES (1)", None, "Accepted: one SELECT"),
        ("SELECT broken(1)", None, "a fault of the function itself"),
        ("SELECT error('said by the query')", None, "said by the query"),
    ],
)
def test_a_wrong_query_says_what_is_wrong_in_one_line(
    connection: Connection, text: str, parameters: object, said: str
) -> None:
    with pytest.raises(QueryError) as caught:
        connection.sql(text, parameters)  # type: ignore[arg-type]
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__, "no traceback of the engine"


@pytest.mark.parametrize("query", ["SELECT refuse(41)", "SELECT refuse(row) FROM tokens"], ids=["constant", "rows"])
def test_what_a_function_raised_arrives_as_it_was(connection: Connection, query: str) -> None:
    with pytest.raises(UnknownName, match=r"^There is no row (41|0|\d+)\. Accepted: 0-9\.$"):
        connection.sql(query)


@pytest.mark.parametrize(
    ("limit", "n_rows", "truncated"),
    [(0, 0, True), (1, 1, True), (259, 259, True), (260, 260, False), (None, 260, False)],
)
def test_a_limit_says_whether_there_was_more(
    connection: Connection, limit: int | None, n_rows: int, truncated: bool
) -> None:
    answer = connection.sql("SELECT row FROM tokens", limit=limit)
    assert (answer.table.num_rows, answer.truncated) == (n_rows, truncated)


def test_a_limit_stops_a_query_without_end(connection: Connection) -> None:
    assert connection.sql("SELECT * FROM range(1_000_000_000_000)", limit=10).table.num_rows == 10


def test_a_stream_is_read_batch_by_batch_and_may_be_left(connection: Connection) -> None:
    with connection.stream("SELECT * FROM range(1_000_000_000_000)", batch_rows=1000) as reader:
        assert reader.read_next_batch().num_rows > 0
    assert connection.stream("SELECT 1 AS one").read_all().to_pydict() == {"one": [1]}


def test_an_error_in_the_middle_of_a_stream_is_translated(connection: Connection) -> None:
    reader = connection.stream("SELECT CASE WHEN range > 500000 THEN error('late') ELSE 'a' END FROM range(1000000)")
    with pytest.raises(QueryError, match="late"):
        for _ in reader:
            pass


def test_too_little_memory_is_a_query_error(index: tuple[FakeSource, Path]) -> None:
    directory = index[1]
    catalog = read_catalog(directory)
    with (
        open_index(catalog, lambda name: directory / name, memory_limit="60MB", threads=1) as small,
        pytest.raises(QueryError, match="more memory"),
    ):
        small.sql("SELECT list(range) FROM range(100_000_000)")


def test_threads_share_a_connection(index: tuple[FakeSource, Path], connection: Connection) -> None:
    def ask(feature: int) -> int:
        query = "SELECT count(*), min(snippet(row, 1, 1)) FROM activations WHERE sae = ? AND feature = ?"
        return int(connection.sql(query, [HALF, feature]).table[0][0].as_py())

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, list(range(40)) * 3))
    counts = Counter(feature for feature, _, _, _ in index[0].all_firings(HALF))
    assert found == [counts[feature] for feature in range(40)] * 3


def test_a_plain_connection_has_the_tables_and_functions_and_is_its_owners(index: tuple[FakeSource, Path]) -> None:
    directory = index[1]
    opened = plain_connection(read_catalog(directory), lambda name: directory / name, functions=FUNCTIONS)
    opened.execute("CREATE TABLE mine AS SELECT snippet(row, 1, 2) AS text FROM tokens LIMIT 2")
    assert len(opened.sql("FROM mine").fetchall()) == 2
    with pytest.raises(duckdb.Error):
        opened.execute("DELETE FROM p0.store")
    with pytest.raises(duckdb.Error, match="There is no row 41"):
        opened.sql("SELECT refuse(41)").fetchall()
    opened.close()


def test_the_room_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'zarr', 'pandas', 'polars', 'scipy'} & set(sys.modules)"
    script = f"import sys, actstore.index; print({heavy} or 'light')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "light"


def test_query_errors_are_actstore_errors(connection: Connection) -> None:
    with pytest.raises(ActstoreError):
        connection.sql("SELECT 1 +")
