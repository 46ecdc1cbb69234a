"""What says what is stored can be lost: that is missed by every door, and nothing is made again over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_support import copy_of_finished, extract_some, finished, hashes, truth
from tiny_world import extract, tiny_world

from actstore import maintenance
from actstore.errors import CorruptStore
from actstore.store import PassWriter, StoreReader, StoreWriter
from actstore.store.location import Location

SECOND: dict[str, Any] = {"dataset": None, "sites": [], "lens_k": 0, "lens_sites": [], "into": True}
DOORS: dict[str, Callable[[Path], object]] = {
    "read": lambda store: StoreReader(store).receipts,
    "index": maintenance.index,
    "extract": extract,
    "extract on any device": lambda store: extract(store, mixed=True),
    "a further pass": lambda store: extract(store, **SECOND, saes=[tiny_world().attention_sae]),
    "append": lambda store: extract(store, append=str(tiny_world().more)),
    "gc": maintenance.collect_garbage,
}


@pytest.mark.parametrize("lost", ["passes/*/sealed-0.json", "layout.json"])
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_list_that_is_lost_is_missed(tmp_path: Path, door: Callable[[Path], object], lost: str) -> None:
    store = copy_of_finished(tmp_path)
    name = lost_name(store, lost)
    (store / name).unlink()
    before = hashes(store, "arrays", "firings", "passes", "index")

    with pytest.raises(CorruptStore, match=rf"{name}.*missing.*verify"):
        door(store)

    assert hashes(store, "arrays", "firings", "passes", "index") == before
    assert any(name in fault for fault in maintenance.verify(store).faults)


def lost_name(store: Path, pattern: str) -> str:
    """Return the file of a pattern that is not the corpus's."""
    (name,) = (path for path in store.glob(pattern) if path.parent.name != "corpus")
    return name.relative_to(store).as_posix()


def test_what_a_lost_manifest_named_can_be_dropped_and_made_again(tmp_path: Path) -> None:
    store = copy_of_finished(tmp_path)
    name = lost_name(store, "passes/*/sealed-0.json")
    (store / name).unlink()
    writer = StoreWriter.open(store)

    for artifact in [one for one in writer.layout.artifacts if one != "corpus/tokens"]:
        writer.drop(artifact)
    assert extract(store).complete

    assert maintenance.verify(store).faults == []
    assert truth(store) == truth(finished())


def test_files_that_are_no_receipts_say_nothing(tmp_path: Path) -> None:
    store = tmp_path / "s.act"
    extract_some(store, 2)
    (home,) = store.glob("passes/*/receipts")
    strays = ["._0.json", "x.json", "00.json", "-1.json", "٣.json", "0.json.bak", "1e3.json", "9" * 50 + ".json"]
    for stray in strays:
        (home / stray).write_bytes(b"\0\5\26\7")

    (receipts,) = StoreReader(store).receipts.values()
    found = maintenance.verify(store)

    assert sorted(receipts) == [0, 1]
    assert found.faults == []
    assert sorted(found.orphans) == sorted((home / stray).relative_to(store).as_posix() for stray in strays)


# Beside a seal


@pytest.fixture
def unsealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, PassWriter]:
    """A store whose pass has all its receipts, and was stopped before it was sealed."""
    store = tmp_path / "s.act"
    monkeypatch.setattr(PassWriter, "seal", lambda passing: False)
    extract(store, with_index=False)
    monkeypatch.undo()
    writer = StoreWriter.open(store)
    return store, PassWriter(writer, writer.layout.passes[0])


def when_listed(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """Do something between the listing of receipts and their reading, once."""
    plain = Location.names

    def names(location: Location, directory: str) -> list[str]:
        found = plain(location, directory)
        if directory.endswith("/receipts"):
            monkeypatch.setattr(Location, "names", plain)
            then()
        return found

    monkeypatch.setattr(Location, "names", names)


@pytest.mark.parametrize(
    "door", [maintenance.verify, lambda store: StoreReader(store).receipts], ids=["verify", "read"]
)
def test_receipts_that_are_sealed_meanwhile_are_no_damage(
    unsealed: tuple[Path, PassWriter], monkeypatch: pytest.MonkeyPatch, door: Callable[[Path], Any]
) -> None:
    store, passing = unsealed
    when_listed(monkeypatch, passing.seal)

    found = door(store)

    assert not list(store.glob("passes/*/receipts/*.json")), "they were sealed"
    if isinstance(found, dict):
        assert sorted(found[passing.pass_id]) == list(range(passing.writer.layout.n_shards))
    else:
        assert (found.faults, found.orphans) == ([], [])
        assert found.n_files == maintenance.verify(store).n_files


def test_a_receipt_that_vanishes_and_is_sealed_nowhere_is_damage(
    unsealed: tuple[Path, PassWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, passing = unsealed
    gone = f"passes/{passing.pass_id}/receipts/3.json"
    when_listed(monkeypatch, (store / gone).unlink)

    assert any(gone in fault for fault in maintenance.verify(store).faults)
