"""Parquet: tables as SQL has them, firings in feature order, files that every reader opens and prunes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asking_support import ATT, RES, SmallStore
from exports_support import MANY_SAE, Raw, many_shards
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.api import Store
from actstore.exports import Source, export, parquet, parquet_files
from actstore.exports.parquet import ORDERS
from actstore.index import TABLES


@pytest.fixture(scope="module")
def replica(opened: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole small store as Parquet."""
    return opened.export(["all"], format="parquet", out=tmp_path_factory.mktemp("parquet") / "replica").path


def firings_of(raw: Raw, sae: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return feature, row and activation of every firing, by feature and row."""
    features, places = np.nonzero(raw.firings(sae).T)
    return features, raw.rows[places], raw.firings(sae)[places, features]


def read_firings(folder: Path, sae: str) -> pa.Table:
    return pq.read_table(folder / "activations" / f"sae={sae}", partitioning=None)


# Content


@pytest.mark.parametrize("table", [table for table in TABLES if table != "activations"])
def test_a_table_is_what_sql_says(opened: Store, replica: Path, table: str) -> None:
    found = pq.read_table(replica / table)
    assert found.column_names == list(TABLES[table])
    order = ", ".join(ORDERS[table].columns) if table in ORDERS else "ALL"
    expected = opened.sql(f"SELECT * FROM {table} ORDER BY {order}").arrow()
    if table not in ORDERS:
        found = duckdb.from_arrow(found).order("ALL").to_arrow_table()
    assert found.to_pylist() == expected.to_pylist()


def test_every_table_that_grows_has_an_order() -> None:
    few_rows = {"store", "passes", "sites", "saes", "heads", "health"}
    assert set(TABLES) == {*ORDERS, *few_rows, "activations"}
    for table, order in ORDERS.items():
        assert set(order.columns) <= set(TABLES[table])


def test_tokens_are_those_of_the_arrays(replica: Path, small: SmallStore) -> None:
    raw, found = Raw(small.path), pq.read_table(replica / "tokens")
    assert np.array_equal(found["row"], raw.rows) and np.array_equal(found["doc"], raw.docs)
    for name in ("token_id", "seq", "pos", "char_start", "char_end"):
        assert np.array_equal(found[name], raw.tokens[name]), name


@pytest.mark.parametrize("sae", [RES, ATT])
def test_firings_are_those_of_the_arrays_by_feature_and_row(replica: Path, small: SmallStore, sae: str) -> None:
    features, rows, activations = firings_of(Raw(small.path), sae)
    found = read_firings(replica, sae)
    assert found.schema == pa.schema([("feature", pa.int32()), ("row", pa.int64()), ("activation", pa.float16())])
    assert np.array_equal(found["feature"], features) and np.array_equal(found["row"], rows)
    assert np.array_equal(np.asarray(found["activation"]).astype(np.float32), activations)


def test_activations_that_are_no_halves_stay_whole(tmp_path: Path) -> None:
    with actstore.open(many_shards()) as store:
        out = store.export([MANY_SAE], format="parquet", out=tmp_path / "out").path
    features, rows, activations = firings_of(Raw(many_shards()), MANY_SAE)
    assert not np.array_equal(activations.astype(np.float16).astype(np.float32), activations)
    found = read_firings(out, MANY_SAE)
    assert found.schema.field("activation").type == pa.float32()
    assert np.array_equal(found["feature"], features) and np.array_equal(found["row"], rows)
    assert np.array_equal(found["activation"], activations)


def test_only_what_was_asked_for_is_written(opened: Store, tmp_path: Path) -> None:
    some = opened.export(["features", ATT, "features"], format="parquet", out=tmp_path / "some").path
    assert sorted(path.relative_to(some).as_posix() for path in some.rglob("*") if path.is_file()) == [
        f"activations/sae={ATT}/part-00000.parquet",
        "digests.json",
        "features/part-00000.parquet",
    ]
    both = opened.export(["activations"], format="parquet", out=tmp_path / "both").path
    assert {path.name for path in (both / "activations").iterdir()} == {f"sae={RES}", f"sae={ATT}"}


# Readers


def test_duckdb_polars_and_pandas_read_the_same(opened: Store, replica: Path) -> None:
    sql = "SELECT sae, feature, row, activation FROM {} WHERE feature = 7 AND activation > 1 ORDER BY ALL"
    expected = opened.sql(sql.format("activations")).rows()
    assert len(expected) > 100
    files = f"read_parquet('{replica}/activations/*/*.parquet', hive_partitioning=true)"
    assert duckdb.execute(sql.format(files)).fetchall() == [tuple(row.values()) for row in expected]
    lazy = pl.scan_parquet(replica / "activations", hive_partitioning=True)
    frame = lazy.filter((pl.col("feature") == 7) & (pl.col("activation") > 1)).collect()
    order = ["sae", "feature", "row"]
    assert frame.select(*order, "activation").sort(order).rows() == [tuple(row.values()) for row in expected]
    table = pd.read_parquet(replica / "activations", filters=[("feature", "==", 7)])
    table = table[table["activation"] > 1].astype({"sae": str}).sort_values(order)
    assert table[[*order, "activation"]].to_dict("records") == expected


def test_tables_open_in_polars_and_pandas(opened: Store, replica: Path) -> None:
    for table in ("tokens", "documents", "features", "lens_tokens"):
        n_rows = opened.sql(f"SELECT count(*) FROM {table}").scalar()
        assert len(pl.read_parquet(replica / table)) == len(pd.read_parquet(replica / table)) == n_rows


def test_readers_can_prune_by_statistics(
    opened: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: SmallStore
) -> None:
    monkeypatch.setattr(parquet_files, "ROW_GROUP_ROWS", 1000)
    out = opened.export([RES], format="parquet", out=tmp_path / "out").path
    file = pq.ParquetFile(out / "activations" / f"sae={RES}" / "part-00000.parquet", page_checksum_verification=True)
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    features = firings_of(Raw(small.path), RES)[0]
    assert [group.num_rows for group in groups] == [*[1000] * (len(features) // 1000), len(features) % 1000]
    for number, group in enumerate(groups):
        here = features[number * 1000 : number * 1000 + 1000]
        statistics = group.column(0).statistics
        assert (statistics.min, statistics.max) == (here[0], here[-1])
        assert [one.column_index for one in group.sorting_columns] == [0, 1]
        assert group.column(2).statistics.has_min_max
        assert "PLAIN" in group.column(2).encodings and "BYTE_STREAM_SPLIT" not in group.column(2).encodings
    assert file.read().num_rows == len(features)


def test_digests_say_what_lies_there(replica: Path) -> None:
    body = json.loads((replica / "digests.json").read_text())
    files = {path.relative_to(replica).as_posix(): path for path in replica.rglob("*.parquet")}
    assert set(body["files"]) == set(files)
    for name, told in body["files"].items():
        data = files[name].read_bytes()
        assert told["sha256"] == hashlib.sha256(data).hexdigest() and told["bytes"] == len(data)
        assert told["rows"] == pq.read_metadata(files[name]).num_rows
    tokens = pq.read_table(replica / "tokens")["row"].to_pylist()
    assert body["files"]["tokens/part-00000.parquet"]["bounds"] == {"row": [tokens[0], tokens[-1]]}


# Blocks and files


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything cut small: many blocks, row groups and files."""
    monkeypatch.setattr(parquet, "BLOCK_FIRINGS", 700)
    monkeypatch.setattr(parquet_files, "ROW_GROUP_ROWS", 500)
    monkeypatch.setattr(parquet_files, "ROWS_PER_FILE", 1500)
    monkeypatch.setattr(parquet, "ORDERS", {name: replace(one, block_rows=100) for name, one in ORDERS.items()})


@pytest.mark.usefixtures("small_blocks")
def test_blocks_and_files_change_nothing(opened: Store, replica: Path, tmp_path: Path) -> None:
    out = opened.export(["all"], format="parquet", out=tmp_path / "out").path
    for table in ORDERS:
        assert pq.read_table(out / table).equals(pq.read_table(replica / table)), table
    for sae in (RES, ATT):
        files = sorted((out / "activations" / f"sae={sae}").iterdir())
        parts = [pq.read_table(file, partitioning=None) for file in files]
        assert len(files) > 5 and all(part.num_rows == 1500 for part in parts[:-1])
        assert pa.concat_tables(parts).combine_chunks().equals(read_firings(replica, sae).combine_chunks())


@pytest.mark.usefixtures("small_blocks")
def test_no_answer_is_larger_than_a_block(opened: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, int] = {}
    batches = Source.batches

    def measured(self: Source, sql: str, parameters: Any = None) -> Iterator[pa.RecordBatch]:
        n_rows = 0
        for batch in batches(self, sql, parameters):
            n_rows += batch.num_rows
            yield batch
        table = sql.split(" FROM ")[1].split()[0]
        sizes[table] = max(n_rows, sizes.get(table, 0))

    monkeypatch.setattr(Source, "batches", measured)
    opened.export(["tokens", "lens_tokens", RES], format="parquet", out=tmp_path / "out")
    assert sizes["tokens"] <= 130 and sizes["lens_tokens"] <= 130  # row numbers have gaps
    assert 500 < sizes["activations"] <= 700


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9) | st.integers(10, 60), min_size=1, max_size=30), st.integers(1, 20), st.integers(60, 90)
)
def test_blocks_of_firings_cover_each_place_once_and_are_bounded(counts: list[int], limit: int, n_rows: int) -> None:
    random = np.random.default_rng(0)
    fired = {(f, row) for f, n in enumerate(counts) for row in random.choice(n_rows, n, replace=False).tolist()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "BLOCK_FIRINGS", limit)
        blocks = list(parquet._firing_blocks(np.array(counts, np.int64), n_rows))
    found: list[tuple[int, int]] = []
    for block in blocks:
        features, rows = range(block["first"], block["end"]), range(block["first_row"], block["end_row"])
        inside = sorted(place for place in fired if place[0] in features and place[1] in rows)
        assert len(inside) <= limit
        found += inside
    assert found == sorted(fired)


def test_firings_that_are_not_indexed_are_refused(opened: Store, tmp_path: Path) -> None:
    catalog, connection = opened.catalog, opened._connection
    without = replace(catalog, parts=tuple(part for part in catalog.parts if part.subject != RES))
    source = Source(opened.url, opened.reader, lambda: (without, connection))
    with pytest.raises(FileNotFoundError, match=f"all firings of {RES}.*actstore index"):
        export(source, [RES], form="parquet", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
