"""The read path: what it answers, what it refuses, and what its errors say."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_support import HALF, WIDE, FakeSource, hashes

from actstore.errors import ActstoreError, QueryError, UnknownName
from actstore.index import TABLES, Connection, SqlFunction, build_index, open_index, plain_connection, read_catalog


def _snippet(rows: pa.Array, before: pa.Array, after: pa.Array) -> pa.Array:
    return pa.array([f"{r}-{b}+{a}" for r, b, a in zip(*(c.to_pylist() for c in (rows, before, after)), strict=True)])


def _refuse(rows: pa.Array) -> pa.Array:
    raise UnknownName(f"There is no row {rows[0]}. Accepted: 0-9.")


def _broken(rows: pa.Array) -> pa.Array:
    raise KeyError("a fault of the function itself")


FUNCTIONS = [
    SqlFunction("snippet", _snippet, ("BIGINT", "INTEGER", "INTEGER"), "VARCHAR"),
    SqlFunction("refuse", _refuse, ("BIGINT",), "VARCHAR"),
    SqlFunction("broken", _broken, ("BIGINT",), "VARCHAR"),
    SqlFunction("is_missing", lambda rows: rows.is_null(), ("BIGINT",), "BOOLEAN", nulls="special"),
    SqlFunction(
        "pairs", lambda rows: pa.array([[{"a": 1, "b": 0.5}]] * len(rows)), ("BIGINT",), "STRUCT(a INTEGER, b FLOAT)[]"
    ),
    SqlFunction("seven", lambda: pa.array([7]), (), "INTEGER"),
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeSource, Path]:
    directory = tmp_path_factory.mktemp("index")
    source = FakeSource()
    source.extract(0, 1, 3)
    build_index(source, directory)
    return source, directory


@pytest.fixture(scope="module")
def connection(index: tuple[FakeSource, Path]) -> Iterator[Connection]:
    directory = index[1]
    with open_index(read_catalog(directory), lambda name: directory / name, functions=FUNCTIONS, threads=2) as opened:
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


HOSTILE = [
    "",
    "-- nothing",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW tokens",
    "DROP VIEW tokens",
    "DELETE FROM p0.store",
    "INSERT INTO p0.store SELECT * FROM p0.store",
    "UPDATE p0.store SET model = 'x'",
    "ALTER TABLE p0.store ADD COLUMN x INTEGER",
    "TRUNCATE p0.store",
    "CREATE TABLE x (a INTEGER)",
    "CREATE TEMP TABLE x AS SELECT 1",
    "CREATE OR REPLACE VIEW tokens AS SELECT 1",
    "CREATE MACRO f() AS 1",
    "CREATE SECRET (TYPE s3)",
    "WITH gone AS (DELETE FROM p0.store RETURNING *) SELECT * FROM gone",
    "WITH more AS (INSERT INTO internal.labels VALUES ('a', 1, 'b') RETURNING *) SELECT * FROM more",
    "SELECT * FROM (WITH x AS (UPDATE internal.labels SET label = 'x' RETURNING *) FROM x)",
    "EXPLAIN ANALYZE DELETE FROM internal.labels",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{part}'",
    "EXPLAIN (FORMAT json) DELETE FROM internal.labels",
    "EXPLAIN SELECT 1; DELETE FROM internal.labels",
    "EXPLAIN EXPLAIN SELECT 1; DROP VIEW tokens",
    "/* why */ EXPLAIN SELECT 1",
    "EXPLAIN /* x */ ANALYZE SELECT 1",
    "/* /* */ EXPLAIN SELECT 1 -- */ CREATE OR REPLACE VIEW tokens AS SELECT 42 AS x",
    "/* /* */ EXPLAIN SELECT 1 -- */ DETACH p0",
    "/* /* */ EXPLAIN ANALYZE SELECT 1 -- */ SELECT path FROM duckdb_databases()",
    "EXPLAIN /* /* */ SELECT 1 -- */ DROP VIEW tokens",
    "EXPLAIN SELECT 1 /* /* */ -- */ ; DROP VIEW tokens",
    "SELECT b.path FROM (WITH duckdb_databases AS (SELECT 1 z) FROM duckdb_databases) a, duckdb_databases b",
    "WITH duckdb_databases AS (FROM duckdb_databases) FROM duckdb_databases",
    "WITH SQLITE_MASTER AS (SELECT 1) FROM main.sqlite_master",
    "WITH tables AS (SELECT 1) FROM information_schema.tables",
    "WITH mine AS (SELECT 1) FROM main.mine",
    "SELECT (WITH pg_tables AS (SELECT 1 AS q) SELECT q FROM pg_tables), (SELECT count(*) FROM pg_tables)",
    "SELECT * FROM (WITH '/etc/passwd' AS (SELECT 1) FROM '/etc/passwd') a, '/etc/passwd' b",
    'SELECT * FROM (WITH "a.csv" AS (SELECT 1) FROM "a.csv") a, "a.csv" b',
    "COPY (SELECT 1) TO '{part}' (FORMAT csv, USE_TMP_FILE false)",
    "COPY tokens TO '/tmp/out.csv'",
    "COPY internal.labels FROM '/etc/passwd'",
    "EXPORT DATABASE '/tmp/out'",
    "IMPORT DATABASE '/tmp/out'",
    "ATTACH '{part}' AS again",
    "ATTACH ':memory:' AS other",
    "DETACH p0",
    "USE p0",
    "SET threads = 1",
    "SET enable_external_access = true",
    "RESET ALL",
    "SET VARIABLE a = 1",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "CALL enable_logging()",
    "INSTALL httpfs",
    "LOAD httpfs",
    "CHECKPOINT",
    "FORCE CHECKPOINT p0",
    "VACUUM",
    "ANALYZE",
    "BEGIN",
    "COMMIT",
    "PREPARE q AS SELECT 1",
    "EXECUTE q",
    "DEALLOCATE q",
    "PIVOT tokens ON token_id USING count(*)",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM '{part}'",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('{part}')",
    "SELECT * FROM read_parquet('x')",
    "SELECT * FROM read_json('x')",
    "SELECT * FROM read_duckdb('{part}')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM query('DROP VIEW tokens')",
    "SELECT * FROM query_table('tokens')",
    "SELECT * FROM json_execute_serialized_sql('{{}}')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_databases()",
    "SELECT * FROM pragma_storage_info('tokens')",
    "SELECT * FROM truncate_duckdb_logs()",
    "SELECT * FROM force_checkpoint('p0')",
    "SELECT * FROM pg_catalog.pg_tables",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM p0.store",
    "SELECT * FROM p0.main.store",
    "SELECT * FROM internal.labels",
    "SELECT * FROM duckdb_tables",
    "SELECT * FROM sqlite_master",
    "SHOW DATABASES",
    "SHOW ALL TABLES",
    "SHOW TABLES FROM p0",
    "DESCRIBE",
    "SELECT * FROM (SHOW DATABASES)",
    "DESCRIBE p0.store",
    "SELECT * FROM p0.main.tokens, main.tokens",
    "SELECT * FROM main.duckdb_tables",
    "SELECT current_setting('temp_directory')",
    "SELECT getenv('HOME')",
    "SELECT sleep_ms(10)",
    "SELECT pg_sleep(1)",
    "SELECT write_log('x')",
    "SELECT list_transform([1], lambda x: sleep_ms(x))",
    "SELECT '" + "x" * (1 << 16) + "'",
    "SELECT " + "(" * 3000 + "1" + ")" * 3000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:60])
def test_everything_else_is_refused_and_changes_nothing(
    index: tuple[FakeSource, Path], connection: Connection, text: str
) -> None:
    directory = index[1]
    before = hashes(directory)
    part = next(directory.glob("core.*"))
    with pytest.raises(QueryError) as caught:
        connection.sql(text.format(part=part))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert hashes(directory) == before
    assert connection.sql("SELECT count(*) FROM store").table[0].to_pylist() == [1]


def test_every_name_that_duckdb_itself_gives_a_relation_is_refused_to_ctes(connection: Connection) -> None:
    cursor = connection._root.cursor()
    names = cursor.execute("SELECT view_name FROM duckdb_views() WHERE internal").fetchall()
    tried = 0
    for (name,) in {*names, *cursor.execute("SELECT table_name FROM duckdb_tables()").fetchall()} - {("labels",)}:
        try:
            cursor.execute(f'SELECT 1 FROM "{name}" LIMIT 0')
        except duckdb.CatalogException:
            continue  # not reached by a bare name
        tried += name not in TABLES
        decoy = f'SELECT 1 FROM (WITH "{name}" AS (SELECT 1) FROM "{name}") a, "{name}" b'
        if name not in TABLES:
            with pytest.raises(QueryError, match="cannot be called"):
                connection.sql(decoy)
    assert tried > 30


FORBIDDEN = [
    "CREATE OR REPLACE VIEW tokens AS SELECT 42 AS x",
    "DROP VIEW tokens",
    "DETACH p0",
    "DELETE FROM internal.labels",
    "FROM duckdb_databases",
    "CREATE TABLE x AS SELECT 1",
    "SELECT path FROM duckdb_databases()",
]
WRAPPING = ["/*", "*/", "--", "\n", "\r", "'", '"', "$$", "$a$", ";", "\\", "(", ")", "\xa0", "\u2028", "\0", "E'"]
WORDS = ["EXPLAIN", "ANALYZE", "DESCRIBE", "SUMMARIZE", "SHOW", "WITH duckdb_databases AS (SELECT 1)", "FROM"]
HARMLESS = ["SELECT 1", "SELECT 'a'", "FROM saes", "SELECT seven() AS seven FROM tokens ORDER BY row LIMIT 1"]


def _runs_of(pieces: tuple[str, ...], length: int) -> list[str]:
    return ["".join(run) for n in range(length + 1) for run in itertools.product(pieces, repeat=n)]


OPENINGS = [
    f"{before}{harmless} {after}"
    for before in _runs_of(("/* ", "*/ ", "-- "), 3)
    for harmless in ("EXPLAIN SELECT 1", "EXPLAIN ANALYZE")
    for after in _runs_of(("/* ", "*/ ", "-- ", "\n", "; ", "'"), 2)
]


def _state(connection: Connection) -> list[object]:
    cursor = connection._root.cursor()
    asked = ("sql FROM duckdb_views()", "sql FROM duckdb_tables()", "database_name FROM duckdb_databases()")
    return [cursor.execute(f"SELECT {what} WHERE NOT internal ORDER BY ALL").fetchall() for what in asked]


def _harmless(connection: Connection, directory: Path, text: str) -> None:
    """Ask for `text`, which may be refused but never be more than a question about the tables."""
    with suppress(QueryError):
        said = str(connection.sql(text).table.to_pydict())
        assert str(directory) not in said, text


@pytest.mark.parametrize("forbidden", [FORBIDDEN[0], FORBIDDEN[-1]])
def test_no_opening_of_comments_and_quotes_hides_a_statement(
    index: tuple[FakeSource, Path], connection: Connection, forbidden: str
) -> None:
    before = _state(connection)
    for opening in OPENINGS:
        _harmless(connection, index[1], opening + forbidden)
    assert _state(connection) == before


PIECES = st.lists(st.sampled_from([*WRAPPING, *WRAPPING, *WORDS, *HARMLESS, *FORBIDDEN]), max_size=6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(PIECES, st.sampled_from([*WORDS, *HARMLESS, "EXPLAIN SELECT 1"]), PIECES, st.sampled_from(FORBIDDEN))
def test_no_nesting_changes_the_catalog_or_tells_where_the_parts_are(
    index: tuple[FakeSource, Path],
    connection: Connection,
    before: list[str],
    middle: str,
    after: list[str],
    forbidden: str,
) -> None:
    expected = _state(connection)
    _harmless(connection, index[1], " ".join([*before, middle, *after, forbidden]))
    _harmless(connection, index[1], " ".join([forbidden, *before, middle, *after]))
    assert _state(connection) == expected


@pytest.mark.parametrize("text", ["EXPLAIN\xa0SELECT 1", "SELECT '\ud800'", "SELECT 1 \0; DROP VIEW tokens"])
def test_odd_characters_are_answered_or_refused(connection: Connection, text: str) -> None:
    before = _state(connection)
    with suppress(QueryError):
        connection.sql(text)
    assert _state(connection) == before


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


def test_the_engine_refuses_even_what_the_check_would_let_pass(
    index: tuple[FakeSource, Path], connection: Connection
) -> None:
    directory = index[1]
    before = hashes(directory)
    part = next(directory.glob("core.*"))
    cursor = connection._root.cursor()
    for text in (
        f"COPY (SELECT 1) TO '{part}' (FORMAT csv, USE_TMP_FILE false)",
        f"FROM read_blob('{part}')",
        f"ATTACH '{part}' AS again",
        "FROM read_csv('/etc/passwd')",
        "SET enable_external_access = true",
        "DELETE FROM p0.store",
    ):
        with pytest.raises(duckdb.Error):
            cursor.execute(text)
    assert hashes(directory) == before


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


def test_threads_share_a_connection(connection: Connection) -> None:
    def ask(feature: int) -> int:
        query = "SELECT count(*), min(snippet(row, 1, 1)) FROM activations WHERE sae = ? AND feature = ?"
        return int(connection.sql(query, [HALF, feature]).table[0][0].as_py())

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, list(range(40)) * 3))
    assert found == [ask(feature) for feature in range(40)] * 3


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
