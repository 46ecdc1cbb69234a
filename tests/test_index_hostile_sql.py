"""Statements that are not one question about the tables: refused, and nothing is changed or told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_sql_support import built_index, connected
from index_support import FakeSource, hashes

from actstore.errors import QueryError
from actstore.index import TABLES, Connection


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeSource, Path]:
    return built_index(tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="module")
def connection(index: tuple[FakeSource, Path]) -> Iterator[Connection]:
    with connected(index[1]) as opened:
        yield opened


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
    labels = cursor.execute("FROM internal.labels ORDER BY ALL").fetchall()
    assert labels, "what could be deleted is there"
    return [labels, *(cursor.execute(f"SELECT {what} WHERE NOT internal ORDER BY ALL").fetchall() for what in asked)]


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
