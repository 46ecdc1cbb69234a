"""A store that is open while another process changes its index: each question is asked of parts that are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from asking_support import ATT, RES, SmallStore

import actstore
from actstore import maintenance
from actstore.api import Store
from actstore.errors import CorruptStore
from actstore.index import load_catalog, read_catalog

N_FIRINGS = "SELECT count(*) FROM activations WHERE sae = ?"


def answers(store: Store) -> None:
    """Show that a store answers by the index from which `ATT` was dropped."""
    assert store.sql(N_FIRINGS, [RES]).scalar() > 0
    assert store.sql(N_FIRINGS, [ATT]).scalar() == 0
    assert not [part for part in store.catalog.parts if part.subject == ATT]


def exported(store: Store) -> None:
    """Show that exports read the same index."""
    assert store.sql("SELECT 1").scalar() == 1
    catalog, connection = store._index()
    assert catalog is store.catalog and connection is store._connection


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(answers, id="a statement"),
        pytest.param(exported, id="an export"),
        pytest.param(lambda store: store.connect().execute("SELECT count(*) FROM tokens").close(), id="a connection"),
    ],
)
def test_parts_that_were_replaced_before_they_were_opened(
    copied: Callable[[], Path], ask: Callable[[Store], None]
) -> None:
    path = copied()
    with actstore.open(path) as store:
        before = store.catalog
        maintenance.drop(path, ATT)  # which collects the garbage as well
        ask(store)
        assert store.catalog == read_catalog(path / "index") != before


def test_a_store_that_was_closed_opens_what_is_there_then(copied: Callable[[], Path]) -> None:
    path = copied()
    store = actstore.open(path)
    assert store.sql(N_FIRINGS, [ATT]).scalar() > 0
    maintenance.drop(path, ATT)
    assert store.sql(N_FIRINGS, [ATT]).scalar() > 0, "what is open stays"
    store.close()
    answers(store)
    store.close()


def test_a_statement_that_ends_duckdb_costs_no_later_one_its_answer(copied: Callable[[], Path]) -> None:
    path = copied()
    with actstore.open(path) as store:
        assert store.sql(N_FIRINGS, [ATT]).scalar() > 0
        maintenance.drop(path, ATT)
        store._connection.has_ended = True  # no statement is known by which DuckDB always ends
        store.sql("SELECT 1")
        answers(store)


def test_a_catalog_that_goes_between_two_readings_is_not_missed(
    copied: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied()

    def overtaken(read: Callable[[str], bytes]) -> object:
        """Read CURRENT, and what it named only when another process has dropped and collected."""
        monkeypatch.setattr("actstore.api.load_catalog", load_catalog)
        current = read("CURRENT")
        maintenance.drop(path, ATT)
        return load_catalog(lambda name: current if name == "CURRENT" else read(name))

    monkeypatch.setattr("actstore.api.load_catalog", overtaken)
    with actstore.open(path) as store:
        answers(store)


@pytest.mark.parametrize("known", [True, False], ids=["the catalog was read before", "the catalog was not read before"])
def test_a_part_that_the_current_catalog_names_must_be_there(copied: Callable[[], Path], known: bool) -> None:
    path = copied()
    with actstore.open(path) as store:
        part = read_catalog(path / "index").parts[-1]
        assert not known or store.catalog.parts
        (path / "index" / part.name).unlink()
        for _ in range(2):
            with pytest.raises(CorruptStore, match=rf"The part {part.name} is missing.*actstore verify"):
                store.sql("SELECT 1")
        with pytest.raises(CorruptStore, match=part.name):
            store.connect()


def test_the_newer_parts_must_be_there_too(copied: Callable[[], Path]) -> None:
    path = copied()
    with actstore.open(path) as store:
        assert store.catalog.parts
        maintenance.drop(path, ATT)
        part = read_catalog(path / "index").parts[0]
        (path / "index" / part.name).unlink()
        with pytest.raises(CorruptStore, match=rf"The part {part.name} is missing"):
            store.sql("SELECT 1")


def test_a_catalog_that_is_missing_is_damage(copied: Callable[[], Path]) -> None:
    path = copied()
    (path / "index" / read_catalog(path / "index").name).unlink()
    with actstore.open(path) as store, pytest.raises(CorruptStore, match=r"CURRENT names catalog-\d+.json.*missing"):
        store.sql("SELECT 1")


def test_of_a_remote_store_as_well(small: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTSTORE_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    try:
        memory.put(str(small.path), "/changing.act", recursive=True)
        with actstore.open("memory://changing.act") as store:
            part = store.catalog.parts[-1].name
            memory.rm(f"/changing.act/index/{part}")
            with pytest.raises(CorruptStore, match=f"The part {part} is missing"):
                store.sql("SELECT 1")
    finally:
        memory.rm("/changing.act", recursive=True)
