"""Functions are called for the rows that are kept, and the answer is the same as when they are called for all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from index_support import WIDE, FakeSource

from actstore.index import Connection, SqlFunction, build_index, open_index

CALLED: list[int] = []


def _mark(rows: pa.Array, *others: pa.Array) -> pa.Array:
    CALLED.append(len(rows))
    columns = [column.to_pylist() for column in (rows, *others)]
    return pa.array(["/".join(map(str, values)) for values in zip(*columns, strict=True)])


MARKS = [
    SqlFunction("mark", _mark, ("BIGINT", "INTEGER", "INTEGER"), "VARCHAR"),
    SqlFunction("mark_one", _mark, ("BIGINT",), "VARCHAR"),
]


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    directory: Path = tmp_path_factory.mktemp("index")
    source = FakeSource()
    source.extract(0, 1, 2, 3, 4)
    catalog = build_index(source, directory)
    with open_index(catalog, lambda name: directory / name, functions=MARKS, threads=1) as opened:
        yield opened


FROM = f"FROM activations a JOIN tokens t USING (row) WHERE a.sae = '{WIDE}' AND a.feature = 1"
ORDER = "ORDER BY a.activation DESC, a.row LIMIT 5"

LATE = {
    "the contract's shape": f"SELECT t.token, mark(a.row, 10, 10) AS example, a.activation {FROM} {ORDER};",
    "two functions": f"SELECT mark(a.row, 1, 2) AS one, a.row, mark_one(a.row) AS two {FROM} {ORDER}",
    "spelled otherwise": f"select 'ü' as ü, MARK (a.row, 1, 2) as \"An Example\" {FROM} {ORDER} -- the end",
    "computed arguments": f"SELECT mark(a.row + 1, t.pos, length(t.token)::INTEGER) AS example {FROM} {ORDER}",
    "within WITH": f"WITH b AS (SELECT a.row AS r, a.activation AS x {FROM}) "
    "SELECT mark_one(r) AS m FROM b ORDER BY x, r LIMIT 5",
    "with an offset": f"SELECT mark_one(a.row) AS m {FROM} {ORDER} OFFSET 3",
}

AS_WRITTEN = {
    "ordered by the function": f"SELECT mark_one(a.row) AS m {FROM} ORDER BY m LIMIT 5",
    "ordered by its place": f"SELECT mark_one(a.row) AS m {FROM} ORDER BY 1 LIMIT 5",
    "ordered by all": f"SELECT mark_one(a.row) AS m {FROM} ORDER BY ALL LIMIT 5",
    "used by another column": f"SELECT mark_one(a.row) AS m, upper(m) AS u {FROM} {ORDER}",
    "used by a condition": f"SELECT mark_one(a.row) AS m {FROM} AND m LIKE '1%' {ORDER}",
    "distinct": f"SELECT DISTINCT mark_one(a.row) AS m, a.row, a.activation {FROM} {ORDER}",
    "grouped": f"SELECT mark_one(t.doc) AS m, count(*) AS n {FROM} GROUP BY t.doc ORDER BY t.doc LIMIT 5",
    "two columns of one name": f"SELECT mark_one(a.row) AS m, t.row, a.row {FROM} {ORDER}",
    "a star": f"SELECT *, mark_one(a.row) AS m {FROM} {ORDER}",
    "no alias": f"SELECT mark_one(a.row) {FROM} {ORDER}",
    "a name in quotes": f'SELECT "mark_one"(a.row) AS m {FROM} {ORDER}',
    "no limit": f"SELECT mark_one(a.row) AS m {FROM} ORDER BY a.row",
    "a union": f"SELECT mark_one(a.row) AS m {FROM} UNION SELECT 'x' ORDER BY m LIMIT 5",
}


def _eagerly(connection: Connection, text: str) -> pa.Table:
    return connection._root.cursor().sql(text).to_arrow_table()


@pytest.mark.parametrize("name", LATE)
def test_called_for_the_rows_that_are_kept(connection: Connection, name: str) -> None:
    CALLED.clear()
    answer = connection.sql(LATE[name]).table
    assert answer.num_rows == 5 and max(CALLED) <= 5
    expected = _eagerly(connection, LATE[name])
    assert answer.to_pydict() == expected.to_pydict() and answer.schema == expected.schema


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_left_as_written_where_the_meaning_might_change(connection: Connection, name: str) -> None:
    CALLED.clear()
    answer = connection.sql(AS_WRITTEN[name]).table
    expected = _eagerly(connection, AS_WRITTEN[name])
    assert answer.schema == expected.schema and answer.equals(expected)


def test_parameters_keep_their_places(connection: Connection) -> None:
    text = (
        "SELECT ? AS first, mark(a.row, ?, ?) AS m FROM activations a WHERE a.sae = ? ORDER BY a.row, a.feature LIMIT ?"
    )
    assert connection.sql(text, ["x", 1, 2, WIDE, 1]).table.to_pylist() == [{"first": "x", "m": "1/1/2"}]
    named = "SELECT mark(a.row, $b, $c) AS m FROM activations a WHERE a.sae = $s ORDER BY a.row, a.feature LIMIT 1"
    assert connection.sql(named, {"b": 1, "c": 2, "s": WIDE}).table.to_pylist() == [{"m": "1/1/2"}]
