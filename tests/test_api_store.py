"""The facade: rows of sites, sparse firings, results, plain connections, remote stores, and how light reading is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pytest
from asking_support import ATT, RES, SHARD_ROWS, SmallStore

import actstore
from actstore import maintenance
from actstore.api import Store
from actstore.errors import CorruptStore, InvalidInput, MissingInput, QueryError, UnknownName
from actstore.plots import CELL_CHARACTERS, SHOWN_ROWS
from actstore.results import Result, distinct_names, text_table

# Sites


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(lambda used: [3], id="a list of one"),
        pytest.param(lambda used: used[::-7], id="an array, falling"),
        pytest.param(lambda used: [5, 5, 2, 5], id="repeated"),
        pytest.param(lambda used: used[[0, -1]].astype(np.uint64), id="unsigned, of the first and last shard"),
        pytest.param(lambda used: tuple(int(row) for row in used[:3]), id="a tuple"),
        pytest.param(lambda used: pa.array(used[:4]), id="an Arrow array"),
    ],
)
def test_rows_of_a_site(opened: Store, small: SmallStore, rows: Callable[[np.ndarray], Any]) -> None:
    truth = small.truth
    wanted = rows(truth.rows)
    found = opened["resid_post.2"][wanted]
    assert found.dtype == np.float32
    places = truth.places(np.asarray(wanted).astype(np.int64))
    np.testing.assert_array_equal(found, truth.matrix("sites/resid_post.2")[places])


def test_one_row_is_a_vector_and_no_row_is_a_matrix(opened: Store) -> None:
    view = opened["z.2"]
    assert view[0].shape == (96,) == (view.width,)
    np.testing.assert_array_equal(view[np.int64(4)], view[[4]][0])
    nothings: list[Any] = [[], np.array([], np.int64), slice(5, 5)]
    for nothing in nothings:
        assert view[nothing].shape == (0, 96)


@pytest.mark.parametrize(
    "rows", [slice(None), slice(400, 1300), slice(0, None, 9), slice(-30, None), slice(700, 600, -1)]
)
def test_a_slice_takes_the_rows_in_use(opened: Store, small: SmallStore, rows: slice) -> None:
    truth = small.truth
    numbers = np.arange(truth.reader.layout.n_shards * SHARD_ROWS)[rows]
    numbers = numbers[np.isin(numbers, truth.rows)]
    expected = truth.matrix("sites/z.2")[truth.places(numbers)]
    np.testing.assert_array_equal(opened["z.2"][rows], expected)
    np.testing.assert_array_equal(opened.activations(RES)[rows].toarray(), opened.activations(RES)[numbers].toarray())


def test_filler_and_nonsense_are_refused(opened: Store, small: SmallStore) -> None:
    filler = int(small.truth.reader.rows_used[0])
    for row in (filler, -1, 10**9):
        for ask in (opened["z.2"], opened.activations(RES)):
            with pytest.raises(UnknownName, match=f"There is no row {row}"):
                ask[[0, row]]
    for nonsense in (1.5, [True, False], "0", [[0, 1], [2, 3]], None):
        for ask in (opened["z.2"], opened.activations(RES)):
            with pytest.raises(InvalidInput, match="Rows are numbers"):
                ask[nonsense]  # type: ignore[index]


def test_the_raw_array_is_there_and_opens_in_zarr(opened: Store, small: SmallStore) -> None:
    raw = opened["resid_post.1"].zarr
    assert raw.shape == (small.truth.reader.layout.n_shards * SHARD_ROWS, 128)
    assert raw.metadata.dimension_names == ("row", "width")  # type: ignore[union-attr]
    assert np.isnan(np.asarray(raw[int(small.truth.reader.rows_used[0])])).all()


def test_names_of_what_is_stored(opened: Store) -> None:
    assert opened.saes == [RES, ATT]
    assert "resid_post.5" in opened.sites and "final" in opened.sites
    assert "model" in repr(opened) and "rows" in repr(opened)
    with pytest.raises(UnknownName, match=r"Did you mean 'resid_post.5'.*--into STORE --site"):
        opened["resid_post.6"]
    with pytest.raises(UnknownName, match=RES):
        opened.activations("other")
    with pytest.raises(UnknownName, match="no lens 'tuned'"):
        opened.lens("tuned", doc=0)
    with pytest.raises(UnknownName, match="no document 999"):
        opened.lens(doc=999)


# Firings


@pytest.mark.parametrize("sae", [RES, ATT])
def test_activations_are_sparse_matrices(opened: Store, small: SmallStore, sae: str) -> None:
    truth, activations = small.truth, opened.activations(sae)
    fired = truth.firings(sae)
    assert activations.shards == list(range(truth.reader.layout.n_shards))
    for shard in activations.shards:
        matrix = activations.shard(shard)
        assert matrix.shape == (SHARD_ROWS, activations.n_features)
        here = fired.row // SHARD_ROWS == shard
        expected = np.zeros(matrix.shape, np.float32)
        expected[fired.row[here] % SHARD_ROWS, fired.feature[here]] = fired.activation[here]
        np.testing.assert_array_equal(matrix.toarray(), expected)
    rows = np.random.default_rng(0).choice(truth.rows, 90)
    found = activations[rows]
    dense = np.zeros(found.shape, np.float32)
    for place, row in enumerate(rows):
        mine = fired.row == row
        dense[place, fired.feature[mine]] = fired.activation[mine]
    np.testing.assert_array_equal(found.toarray(), dense)
    assert activations[[]].shape == (0, activations.n_features)
    assert activations[int(rows[0])].shape == (1, activations.n_features)


# Results


def test_a_result_is_arrow_and_whatever_reads_arrow(opened: Store) -> None:
    result = opened.sql("SELECT row, token, is_special FROM tokens ORDER BY row LIMIT 5")
    assert isinstance(result.arrow(), pa.Table)
    assert pa.table(result).equals(result.arrow())
    assert result.pl().shape == (5, 3)
    assert result.df()["row"].tolist() == result.numpy()["row"].tolist()
    assert result.rows() == result.pl().to_dicts()
    assert len(result) == 5 and not result.truncated


def test_vectors_become_one_matrix(opened: Store, small: SmallStore) -> None:
    found = opened.sql("SELECT row, act('z.3', row) AS z FROM tokens ORDER BY row LIMIT 7").numpy()["z"]
    np.testing.assert_array_equal(found, small.truth.matrix("sites/z.3")[:7])
    assert found.dtype == np.float32
    ragged = opened.sql("SELECT unnest([[1.0], [1.0, 2.0]]) AS a").numpy()["a"]
    assert [len(one) for one in ragged] == [1, 2]
    assert opened.sql("SELECT [1, 2] AS a WHERE false").numpy()["a"].shape[0] == 0
    assert opened.sql("SELECT NULL::FLOAT[] AS a UNION ALL SELECT [1, 2]").numpy()["a"].shape == (2,)


def test_a_limit_says_that_there_was_more(opened: Store) -> None:
    assert opened.sql("SELECT * FROM tokens", limit=3).truncated
    exact = opened.sql("SELECT * FROM tokens LIMIT 3", limit=3)
    assert len(exact) == 3 and not exact.truncated
    assert len(opened.query("surprising_tokens", {"k": 9}, limit=4)) == 4


def test_scalar_is_one_value_or_an_error(opened: Store) -> None:
    assert opened.sql("SELECT 3").scalar() == 3
    for text in ("SELECT 1, 2", "SELECT 1 WHERE false", "SELECT unnest([1, 2])"):
        with pytest.raises(InvalidInput, match="rows of"):
            opened.sql(text).scalar()


def test_a_column_that_comes_twice_is_not_lost(opened: Store) -> None:
    result = opened.sql("SELECT 1 AS a, 2 AS a, 3 AS a_1, 4 AS a")
    assert list(result.rows()[0].values()) == [1, 2, 3, 4]
    assert len(result.numpy()) == 4
    table = pa.table({"a": [1], "b": [2]})
    assert distinct_names(table) is table


def test_a_notebook_shows_text_and_obeys_none_of_it(opened: Store) -> None:
    hostile = '<script>alert(1)</script> «the token» & "quotes"'
    shown = opened.sql('SELECT $text AS "<b>", $text AS example', {"text": hostile})._repr_html_()
    assert "<script>" not in shown and "<b>" not in shown
    assert "&lt;script&gt;" in shown and "<mark>the token</mark>" in shown
    long = opened.sql("SELECT repeat('x', 5000) AS x, unnest(range(100)) AS n", limit=60)._repr_html_()
    assert "x" * (CELL_CHARACTERS + 1) not in long
    assert long.count("<tr>") == SHOWN_ROWS + 1 and "there are more" in long
    document = opened.sql("SELECT text FROM documents WHERE text LIKE '%script%' LIMIT 1")
    assert "<script>" not in document._repr_html_()


def test_a_terminal_gets_one_line_a_row_and_no_control_characters() -> None:
    table = pa.table({"text": ["a\nb\tc\x1b[31mred", None], "number": [1.23456789, 2e9], "list": [[{"f": 1}], []]})
    shown = text_table(Result(table, truncated=True), width=60)
    assert len(shown.splitlines()) == 2 + 2 + 1
    assert "\x1b" not in shown and "a⏎b⇥c�[31mred" in shown
    assert "1.235" in shown and "there are more" in shown.splitlines()[-1]
    narrow = text_table(Result(pa.table({"a": ["x" * 500], "b": ["y" * 500]})), width=40)
    assert max(map(len, narrow.splitlines())) <= 40 and "…" in narrow


# Connections


def test_a_plain_connection_has_tables_and_functions(opened: Store, small: SmallStore, tmp_path: Path) -> None:
    connection = opened.connect()
    assert isinstance(connection, duckdb.DuckDBPyConnection)
    row = int(small.truth.rows[20])
    assert connection.execute("SELECT count(*) FROM tokens").fetchall() == [(len(small.truth.rows),)]
    found = connection.execute(f"SELECT snippet({row}, 2, 2), act('z.2', {row})").fetchall()[0]
    assert found[0] == small.truth.snippet(row, 2, 2)
    np.testing.assert_array_equal(np.float32(found[1]), small.truth.matrix("sites/z.2")[20])
    connection.execute(f"COPY (SELECT 1) TO '{tmp_path / 'own.parquet'}'")  # it is its owner's
    assert (tmp_path / "own.parquet").exists()
    connection.close()


def test_the_stores_own_path_is_limited(opened: Store, small: SmallStore) -> None:
    before = sorted(small.path.rglob("*"))
    for text in ("CREATE TABLE x (a INT)", "DROP VIEW tokens", "COPY tokens TO '/tmp/never.csv'", "SELECT 1; SELECT 2"):
        with pytest.raises(QueryError):
            opened.sql(text)
    assert sorted(small.path.rglob("*")) == before


def test_a_closed_store_opens_again_when_asked(small: SmallStore) -> None:
    store = small.open()
    assert store.sql("SELECT 1").scalar() == 1
    store.close()
    store.close()
    assert store.sql("SELECT 2").scalar() == 2
    store.close()


def test_a_snapshot_does_not_see_what_comes_later(copied: Callable[[], Path]) -> None:
    path = copied()
    with actstore.open(path) as before:
        assert before.sql("SELECT count(*) FROM saes").scalar() == 2
        maintenance.drop(path, ATT)
        with actstore.open(path) as after:
            assert after.saes == [RES]
            assert after.sql(f"SELECT count(*) FROM activations WHERE sae = '{ATT}'").scalar() == 0
        assert before.sql("SELECT count(*) FROM saes").scalar() == 2


# Remote


@pytest.fixture
def remote(small: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ACTSTORE_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for file in small.path.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"/far.act/{file.relative_to(small.path).as_posix()}", file.read_bytes())
    yield "memory://far.act"
    memory.rm("/far.act", recursive=True)


def test_a_remote_store_answers_like_a_local_one(remote: str, opened: Store, tmp_path: Path) -> None:
    with actstore.open(remote) as far:
        for name, given in {
            "max_activating": {"sae": RES, "feature": 9},
            "document_features": {"sae": ATT, "doc": 5},
            "logit_lens": {"doc": 3},
            "surprising_tokens": {"k": 5},
        }.items():
            assert far.query(name, given).arrow().equals(opened.query(name, given).arrow())  # type: ignore[arg-type]
        question = f"SELECT row, act('z.2', row), firings('{RES}', row), snippet(row, 3, 3) FROM tokens ORDER BY row"
        assert far.sql(question).arrow().equals(opened.sql(question).arrow())
        np.testing.assert_array_equal(far["final"][100:200], opened["final"][100:200])
        assert far.url == remote
    cached = sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    for part in opened.catalog.parts:
        assert any(path.parent.name == part.sha256 and path.name == part.name for path in cached)


def test_a_second_opening_reads_parts_from_the_cache(remote: str) -> None:
    with actstore.open(remote) as far:
        first = far.sql("SELECT count(*) FROM activations").scalar()
        part = next(one for one in far.catalog.parts if one.kind == "firings").name
    fsspec.filesystem("memory").rm(f"/far.act/index/{part}")
    with actstore.open(remote) as far:
        assert far.sql("SELECT count(*) FROM activations").scalar() == first


def test_a_part_that_is_not_what_the_catalog_says_is_refused(remote: str) -> None:
    memory = fsspec.filesystem("memory")
    with actstore.open(remote) as far:
        part = far.catalog.parts[-1].name
        data = memory.cat_file(f"/far.act/index/{part}")
        memory.pipe_file(f"/far.act/index/{part}", data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CorruptStore, match="not what the store lists"):
            far.sql("SELECT 1")


def test_what_changes_a_store_wants_it_local(remote: str) -> None:
    changes: list[Callable[[Any], Any]] = [maintenance.index, maintenance.collect_garbage, maintenance.local]
    for change in changes:
        with pytest.raises(InvalidInput, match=r"is remote.*copy it here"):
            change(remote)


def test_where_there_is_no_store(tmp_path: Path) -> None:
    for nowhere in (tmp_path / "none", tmp_path, "memory://nowhere.act", "nosuchscheme://x"):
        with pytest.raises(MissingInput) as caught:
            actstore.open(nowhere)
        assert isinstance(caught.value, FileNotFoundError)


# Light


LIGHT = """
import sys
import actstore
store = actstore.open({path!r})
store.sql("SELECT count(*) FROM tokens").scalar()
for name, given in {queries!r}.items():
    store.query(name, given)
store.sql("SELECT act('z.2', 3), firings({sae!r}, 3), logit_lens('resid_post.1', 3, 2), snippet(3, 2, 2)")
store.sql("SELECT token_id('<bos>')")
store["resid_post.2"][:10], store.activations({sae!r})[:10], store.lens(doc=3), repr(store)
store.connect().close()
heavy = [name for name in ("torch", "transformers", "datasets", "tokenizers") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""


def test_reading_imports_neither_torch_nor_transformers(small: SmallStore) -> None:
    queries = {
        "logit_lens": {"doc": 3},
        "lens_trajectory": {"doc": 3},
        "max_activating": {"sae": RES, "feature": 9},
        "feature_stats": {"sae": RES},
        "token_features": {"sae": RES, "row": 5},
        "document_features": {"sae": RES, "doc": 5},
        "surprising_tokens": {},
    }
    program = LIGHT.format(path=str(small.path), queries=queries, sae=RES)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


FIRST = """
import sys
import actstore
store = actstore.open({path!r})
assert len(store.query("max_activating", {{"sae": {sae!r}, "feature": 9}}).rows()) > 1
assert len(store.sql("SELECT row, token, is_special FROM tokens LIMIT 3").rows()) == 3
heavy = [name for name in ("pandas", "pyarrow.compute", "numpy.ma", "ml_dtypes") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""


def test_a_first_answer_waits_for_no_library_that_it_does_not_need(small: SmallStore) -> None:
    # pyarrow imports pandas, where it is, for any array that is made of Python values or of numpy's.
    program = FIRST.format(path=str(small.path), sae=RES)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_statement_that_ends_the_database_ends_no_other(small: SmallStore) -> None:
    with actstore.open(small.path) as store:
        with pytest.raises(QueryError, match="JSON path"):
            store.sql("SELECT list_transform(['*'], lambda key: metadata ->> key) FROM documents")
        assert store.sql("SELECT count(*) FROM documents").scalar() > 0
        assert store.query("contents").rows()
