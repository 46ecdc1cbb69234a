"""A store from elsewhere: its catalog and its parts are sealed and agree, and still nothing in them is believed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest
from index_support import HALF, FakeSource

from actstore.errors import CorruptStore
from actstore.index import (
    CURRENT,
    Catalog,
    Cover,
    Part,
    build_index,
    compact,
    compaction,
    load_catalog,
    open_index,
    plain_connection,
    read_catalog,
    verify_index,
)
from actstore.index.catalog import FORMAT
from actstore.sealed import seal, sha256_hex, sha256_of_file

SECRET = "a,b\n424242,1\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("built")
    source = FakeSource(segments_shards=(1,))
    source.saes = [HALF]
    source.extract(0)
    build_index(source, directory)
    return directory


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


def publish(directory: Path, body: dict[str, Any], name: str = "catalog-900.json") -> None:
    """Make `body` the current catalog, sealed as a real one."""
    data = seal(body)
    (directory / name).write_bytes(data)
    (directory / CURRENT).write_bytes(seal({"catalog": name, "sha256": sha256_hex(data)}))


def body_of(catalog: Catalog) -> dict[str, Any]:
    parts = [copy.deepcopy(part.to_json()) for part in catalog.parts]
    return {"format": FORMAT, "number": 900, "next_number": 901, "parts": parts}


def change(directory: Path, kind: str, *statements: str) -> Part:
    """Change the part of a kind by SQL, and publish a catalog that names it as it is now."""
    catalog = read_catalog(directory)
    (part,) = catalog.select(kind)
    path = directory / part.name
    with duckdb.connect(str(path)) as connection:
        for statement in statements:
            connection.execute(statement)
    changed = replace(part, n_bytes=path.stat().st_size, sha256=sha256_of_file(path))
    parts = [changed if other is part else other for other in catalog.parts]
    publish(directory, body_of(Catalog(900, tuple(parts), 901)))
    return changed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../core.1.duckdb"),
        ("name", "/etc/core.duckdb"),
        ("name", "sub/core.duckdb"),
        ("name", ".."),
        ("name", ".hidden.duckdb"),
        ("name", "core.duckdb\n"),
        ("name", "core?x=.duckdb"),
        ("name", "core%2f.duckdb"),
        ("name", "core\\x.duckdb"),
        ("name", "/etc/passwd"),
        ("name", 7),
        ("name", None),
        ("sha256", "A" * 64),
        ("sha256", "a" * 63),
        ("sha256", ""),
        ("sha256", None),
        ("n_bytes", -1),
        ("n_bytes", "5"),
        ("n_bytes", 1 << 70),
        ("n_rows", 0.5),
        ("kind", "others"),
        ("kind", ["core"]),
        ("subject", "one/too/many"),
        ("subject", 5),
        ("facts", {}),
        ("facts", {"activation": "other", "plain_rows": 1}),
        ("facts", {"activation": "half", "plain_rows": "x"}),
        ("facts", None),
        ("covers", 5),
        ("covers", [{}]),
        ("covers", [{"runs": [[0, 1]], "receipts": "x"}]),
        ("surplus", 1),
    ],
    ids=repr,
)
def test_a_catalog_whose_part_cannot_be_one_is_refused(index: Path, field: str, value: object) -> None:
    body = body_of(read_catalog(index))
    (firings,) = (part for part in body["parts"] if part["kind"] == "firings")
    firings[field] = value
    publish(index, body)
    with pytest.raises(CorruptStore, match="Next: "):
        read_catalog(index)
    assert len(verify_index(index)) == 1


@pytest.mark.parametrize(
    "runs",
    [[], [[0, 10**12]], [[0, 0]], [[5, 1]], [[-1, 1]], [[0, 2], [1, 3]], [[3, 4], [0, 1]], [["0", "1"]], [[0.0, 1.5]]],
    ids=repr,
)
def test_runs_of_shards_that_no_part_covers_are_refused(index: Path, runs: list[list[Any]]) -> None:
    body = body_of(read_catalog(index))
    body["parts"][-1]["covers"] = [{"runs": runs, "receipts": "0" * 64}]
    publish(index, body)
    with pytest.raises(CorruptStore):
        read_catalog(index)


def test_runs_stay_runs_until_they_are_compared() -> None:
    done = {shard: f"r{shard}" for shard in (0, 1, 2, 5)}
    cover = Cover.of(done, [5, 0, 2, 1])
    assert cover.runs == ((0, 3), (5, 6)) and list(cover.shards) == [0, 1, 2, 5]
    assert cover.holds(done) and not cover.holds({**done, 2: "other"}) and not cover.holds({0: "r0"})
    assert not Cover(((0, 10_000_000),), cover.receipts).holds(done)


@pytest.mark.parametrize("field", ["number", "next_number", "parts"])
@pytest.mark.parametrize("value", [None, "x", [5]], ids=repr)
def test_a_sealed_document_that_is_no_catalog_is_refused(index: Path, field: str, value: object) -> None:
    publish(index, {**body_of(read_catalog(index)), field: value})
    with pytest.raises(CorruptStore, match="is no catalog"):
        read_catalog(index)


@pytest.mark.parametrize("name", ["../catalog-1.json", "/etc/passwd", "catalog-1.json/..", "catalog-x.json", 5, None])
def test_current_names_nothing_but_a_catalog(index: Path, name: object) -> None:
    asked: list[str] = []

    def read(asked_for: str) -> bytes:
        asked.append(asked_for)
        return seal({"catalog": name, "sha256": "0" * 64})

    with pytest.raises(CorruptStore, match="which is no catalog"):
        load_catalog(read)
    assert asked == [CURRENT]


VIEW = ("DROP TABLE predictions", "CREATE VIEW predictions AS SELECT a AS row FROM read_csv('{secret}')")
SURPLUS = {
    "a view in place of the table": VIEW,
    "a view beside it": ("CREATE VIEW other AS SELECT * FROM read_csv('{secret}')",),
    "a macro": ("CREATE MACRO range(n) AS (SELECT max(a) FROM read_csv('{secret}'))",),
    "a table macro": ("CREATE MACRO other(n) AS TABLE SELECT * FROM read_csv('{secret}')",),
    "a type": ("CREATE TYPE other AS ENUM ('a')",),
    "a schema": ("CREATE SCHEMA other", "CREATE VIEW other.x AS SELECT * FROM read_csv('{secret}')"),
    "another table": ("CREATE TABLE other (row BIGINT)",),
    "no table": ("DROP TABLE predictions",),
    "another column": ("ALTER TABLE predictions ADD COLUMN other INTEGER",),
    "another type": ("ALTER TABLE predictions ALTER entropy TYPE VARCHAR",),
    "a default": ("ALTER TABLE predictions ALTER entropy SET DEFAULT 1.0",),
    "a generated column": (
        "DROP TABLE predictions",
        "CREATE TABLE predictions (row BIGINT, target_id INTEGER, target_logprob FLOAT, top1_id INTEGER, "
        "top1_prob FLOAT, entropy FLOAT GENERATED ALWAYS AS (CAST(current_setting('threads') AS FLOAT)))",
    ),
}
OPEN: dict[str, Callable[..., Any]] = {"open_index": open_index, "plain_connection": plain_connection}


@pytest.mark.parametrize(
    ("surplus", "opened"),
    [
        *((surplus, "open_index") for surplus in SURPLUS),
        *((surplus, "plain_connection") for surplus in list(SURPLUS)[:3]),
    ],
)
def test_a_part_that_holds_more_than_its_tables_is_refused(
    index: Path, tmp_path: Path, surplus: str, opened: str
) -> None:
    (tmp_path / "secret.csv").write_text(SECRET)
    secret = tmp_path / "secret.csv"
    part = change(index, "predictions", *(text.format(secret=secret) for text in SURPLUS[surplus]))
    assert verify_index(index) == [], "the files are what the catalog says"
    with pytest.raises(CorruptStore, match=f"The part {part.name} holds .*not only the tables predictions"):
        OPEN[opened](read_catalog(index), lambda name: index / name)


@pytest.mark.parametrize("opened", OPEN)
def test_a_part_of_another_kind_of_database_is_not_looked_into(index: Path, opened: str) -> None:
    part = change(index, "predictions")
    body = (b"SQLite format 3\0" + bytes(part.n_bytes))[: part.n_bytes]
    (index / part.name).write_bytes(body)
    with pytest.raises(CorruptStore, match="not a valid DuckDB database"):
        OPEN[opened](read_catalog(index), lambda name: index / name)


def test_nothing_from_a_refused_part_is_joined_or_summarised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret.csv").write_text(SECRET)
    monkeypatch.setattr(compaction, "MAX_PARTS", 1)
    source = FakeSource(segments_shards=(2,))
    source.saes = [HALF]
    for shard in range(2):
        source.extract(shard)
        build_index(source, tmp_path / "index")
    catalog = read_catalog(tmp_path / "index")
    for kind in ("predictions", "firings"):
        changed = Path(shutil.copytree(tmp_path / "index", tmp_path / kind))
        for part in catalog.select(kind):
            with duckdb.connect(str(changed / part.name)) as connection:
                connection.execute(f"CREATE VIEW other AS SELECT * FROM read_csv('{tmp_path}/secret.csv')")
        with pytest.raises(CorruptStore, match="holds the view other"):
            compact(changed)
    source.compute_logits(HALF)
    with pytest.raises(CorruptStore, match="holds the view other"):
        build_index(source, tmp_path / "firings")
