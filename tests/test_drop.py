"""What a drop takes with it, what it reads, and what it says when something else is damaged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_support import copy_of_finished, extract_some, hashes
from tiny_world import ATTENTION_SAE, RESIDUAL_SAE, extract, tiny_world

import actstore
from actstore import maintenance
from actstore.errors import CorruptStore, StoreBusy, UnknownName
from actstore.store import StoreReader, StoreWriter, exclusive

SECOND: dict[str, Any] = {"dataset": None, "sites": [], "lens_k": 0, "lens_sites": [], "into": True}
FIRINGS = f"firings/{RESIDUAL_SAE}"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return copy_of_finished(tmp_path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Labels


def give_labels(store: Path, *labels: tuple[str, int, str]) -> None:
    file = store.parent / "labels.csv"
    file.write_text("\n".join(["sae,feature,label", *(f"{sae},{feature},{text}" for sae, feature, text in labels)]))
    assert maintenance.label(store, file) == len(labels)


def encoded_as_the_residual_one(store: Path) -> None:
    """Make another SAE's firings under the id of the residual one."""
    extract(store, saes=[f"{RESIDUAL_SAE}={tiny_world().folder / 'attention'}@z.0"], **SECOND)


@pytest.fixture
def labelled(store: Path) -> Path:
    extract(store, saes=[tiny_world().attention_sae], **SECOND)
    give_labels(store, (RESIDUAL_SAE, 3, "cats"), (RESIDUAL_SAE, 4, "hats"), (ATTENTION_SAE, 3, "boats"))
    return store


DROPS: dict[str, Callable[[Path], object]] = {
    "maintenance": lambda store: maintenance.drop(store, RESIDUAL_SAE),
    "writer": lambda store: StoreWriter.open(store).drop(FIRINGS),
}


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
def test_the_labels_of_a_dropped_sae_go_and_those_of_others_stay(
    labelled: Path, drop: Callable[[Path], object]
) -> None:
    drop(labelled)
    assert StoreReader(labelled).labels() == [(ATTENTION_SAE, 3, "boats")]

    encoded_as_the_residual_one(labelled)

    with actstore.open(labelled) as opened:
        rows = opened.sql("SELECT sae, feature, label FROM features WHERE label IS NOT NULL").arrow().to_pylist()
    assert rows == [{"sae": ATTENTION_SAE, "feature": 3, "label": "boats"}]
    assert maintenance.verify(labelled).ok


def test_a_drop_says_how_many_labels_go_with_the_sae(labelled: Path) -> None:
    said: list[str] = []
    maintenance.drop(labelled, RESIDUAL_SAE, lambda doing, *_: said.append(doing))

    assert f"removed with {FIRINGS}: 2 labels of its features" in said


@pytest.mark.parametrize("artifact", ["predictions", "sites/resid_post.1"])
def test_labels_stay_when_something_else_is_dropped(labelled: Path, artifact: str) -> None:
    before = StoreReader(labelled).labels()
    maintenance.drop(labelled, artifact)

    assert StoreReader(labelled).labels() == before != []


def test_labels_that_a_drop_left_as_it_died_are_not_those_of_the_next_sae(
    labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Stands for the moment at which a process dies."""

    def die(*_: object) -> int:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("actstore.store.writer.forget_labels", die)
        with pytest.raises(Killed):
            maintenance.drop(labelled, RESIDUAL_SAE)
    encoded_as_the_residual_one(labelled)

    assert StoreReader(labelled).labels() == [(ATTENTION_SAE, 3, "boats")]


def test_labels_stay_when_a_stopped_pass_is_resumed(tmp_path: Path) -> None:
    extract_some(tmp_path / "s", 2)
    give_labels(tmp_path / "s", (RESIDUAL_SAE, 3, "cats"))
    extract(tmp_path / "s")

    assert StoreReader(tmp_path / "s").labels() == [(RESIDUAL_SAE, 3, "cats")]


def test_who_labels_while_an_sae_is_dropped_is_told_that_it_is_gone(
    labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, raised = threading.Event(), list[Exception]()

    def told(*arguments: Any, **options: Any) -> Any:
        waiting.set()
        return exclusive(*arguments, **options)

    def label() -> None:
        try:
            give_labels(labelled, (RESIDUAL_SAE, 7, "late"))
        except UnknownName as error:
            raised.append(error)

    monkeypatch.setattr("actstore.maintenance.exclusive", told)
    labelling = threading.Thread(target=label)
    with exclusive(labelled):
        labelling.start()
        assert waiting.wait(60.0)
        StoreWriter.open(labelled).drop(FIRINGS)
    labelling.join()

    assert len(raised) == 1
    assert StoreReader(labelled).labels() == [(ATTENTION_SAE, 3, "boats")]


# What is read


@pytest.mark.parametrize("with_index", [True, False], ids=["indexed", "not indexed"])
def test_a_drop_reads_no_array_no_firings_and_no_weights(store: Path, with_index: bool) -> None:
    """However damaged all else is, what was asked for goes, and no other file does. An index asks for display texts."""
    if not with_index:
        (store / "index" / "CURRENT").unlink()
    weights = StoreReader(store).kit_digest(f"sae/{RESIDUAL_SAE}")
    texts = StoreReader(store).store.vocabulary
    for name in hashes(store, "arrays", "firings", "kit"):
        if not name.endswith(("zarr.json", f"{texts}.zip")):
            flip(store / name)
    before = hashes(store, "arrays", "firings", "kit", "passes", "journal")

    assert maintenance.drop(store, RESIDUAL_SAE) == FIRINGS

    gone = set(before) - set(hashes(store, "arrays", "firings", "kit", "passes", "journal"))
    own = (f"{FIRINGS}/", f"arrays/reconstruction/{RESIDUAL_SAE}/")
    assert gone == {name for name in before if name.startswith(own)} | {f"kit/{weights}.zip"}


def test_a_drop_leaves_what_it_does_not_own_to_gc(store: Path) -> None:
    orphan = store / "arrays/sites/left.over"
    orphan.write_bytes(b"of a run that died")
    maintenance.drop(store, RESIDUAL_SAE)
    assert orphan.exists()

    assert maintenance.collect_garbage(store) == ["arrays/sites/left.over"]


def test_kit_that_another_pass_names_stays(store: Path) -> None:
    """Both passes have the unembedding; the second has nothing else that the first has not."""
    extract(store, saes=[], **(SECOND | {"sites": ["resid_post.2"], "predictions": False, "with_index": False}))
    before = hashes(store, "kit")
    maintenance.drop(store, "sites/resid_post.2")

    assert hashes(store, "kit") == before
    assert maintenance.verify(store).ok


# What is said


def test_a_drop_is_done_though_what_the_pass_of_another_artifact_says_is_damaged(store: Path) -> None:
    """What the damaged one needs of the kit is not known, so all of it stays; the index cannot be made of it."""
    extract(store, saes=[tiny_world().attention_sae], **SECOND)
    first, _ = StoreReader(store).layout.passes
    flip(store / "passes" / first / "pass.json")
    kit = hashes(store, "kit")

    with pytest.raises(CorruptStore, match=rf"firings/{ATTENTION_SAE} is gone, but .*pass\.json.*actstore index"):
        maintenance.drop(store, ATTENTION_SAE)

    assert f"firings/{ATTENTION_SAE}" not in StoreReader(store).layout.artifacts
    assert not (store / "firings" / ATTENTION_SAE).exists()
    assert hashes(store, "kit") == kit


def test_a_drop_whose_index_is_busy_says_that_the_artifact_is_gone(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.maintenance.LOCK_SECONDS", 0.1)
    with exclusive(store, "index.lock"), pytest.raises(StoreBusy, match=f"{FIRINGS} is gone, but .*actstore index"):
        maintenance.drop(store, RESIDUAL_SAE)
    assert FIRINGS not in StoreReader(store).layout.artifacts

    maintenance.index(store)
    maintenance.collect_garbage(store)
    found = maintenance.verify(store)
    assert (found.faults, found.orphans) == ([], [])


@pytest.mark.parametrize("damaged", ["labels.json", "arrays/sites/resid_post.1/zarr.json"])
def test_a_drop_that_is_refused_for_damage_removes_nothing(labelled: Path, damaged: str) -> None:
    flip(labelled / damaged)
    before = hashes(labelled)

    with pytest.raises(CorruptStore, match=Path(damaged).name):
        maintenance.drop(labelled, RESIDUAL_SAE)

    assert hashes(labelled) == before
