"""Deaths between two steps that belong together: what is left is whole, and the next run goes on from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_support import copy_of_finished, finished, same_bits, stopping_after, truth
from tiny_world import RESIDUAL_SAE, extract, tiny_world

from actstore import maintenance
from actstore.errors import CorruptStore, InvalidInput
from actstore.store import PassWriter, StoreReader, StoreWriter

SITE = "sites/resid_post.1"
FIRINGS = f"firings/{RESIDUAL_SAE}"
SECOND: dict[str, Any] = {"dataset": None, "sites": [], "lens_k": 0, "lens_sites": [], "into": True}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return copy_of_finished(tmp_path)


class Killed(BaseException):
    """Stands for the moment at which a process dies: nothing may catch it."""


@pytest.fixture(scope="module")
def appended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished store with more documents, by runs that nothing interrupted."""
    store = copy_of_finished(tmp_path_factory.mktemp("appended"))
    extract(store, append=str(tiny_world().more), with_index=False)
    return store


@pytest.mark.parametrize("n_written", [0, 1, 6])
def test_an_append_that_dies_as_the_arrays_grow_is_no_fault_and_resumes(
    store: Path, appended: Path, monkeypatch: pytest.MonkeyPatch, n_written: int
) -> None:
    rows = np.arange(10)
    before = StoreReader(store).gather(SITE, rows)
    die_in_rewrite(monkeypatch, n_written)

    with pytest.raises(Killed):
        extract(store, append=str(tiny_world().more), with_index=False)
    monkeypatch.undo()

    assert StoreReader(store).layout == StoreReader(finished()).layout
    assert maintenance.verify(store).faults == []
    assert same_bits(StoreReader(store).gather(SITE, rows), before)
    if n_written == 1:
        maintenance.collect_garbage(store)
        assert maintenance.verify(store).orphans == []
    extract(store, append=str(tiny_world().more), with_index=False)
    assert truth(store) == truth(appended)
    assert maintenance.verify(store).faults == []


def die_in_rewrite(monkeypatch: pytest.MonkeyPatch, n_written: int) -> None:
    """Make the writer die after it made so many arrays longer."""
    written: list[str] = []
    rewrite = StoreWriter._rewrite

    def dying(writer: StoreWriter, path: str, data: bytes) -> None:
        if (writer.root / path).read_bytes() != data:
            if len(written) == n_written:
                raise Killed
            written.append(path)
        rewrite(writer, path, data)

    monkeypatch.setattr(StoreWriter, "_rewrite", dying)


def test_damaged_metadata_is_not_sealed_into_a_new_layout(store: Path) -> None:
    path = store / "arrays" / SITE / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b'"width"', b'"breadth"'))

    with pytest.raises(CorruptStore, match=SITE):
        StoreWriter.open(store).drop("predictions")
    with pytest.raises(CorruptStore, match=SITE):
        extract(store, append=str(tiny_world().more))

    assert any(SITE in fault for fault in maintenance.verify(store).faults)


def test_a_store_whose_extraction_never_began_verifies_and_resumes(tmp_path: Path) -> None:
    def stop(doing: str, done: float, total: float | None, unit: str) -> None:
        if doing == "proving sites and SAEs":
            raise Killed

    with pytest.raises(Killed):
        extract(tmp_path / "s", report=stop)
    assert maintenance.verify(tmp_path / "s").faults == []
    with pytest.raises(InvalidInput, match=r"corpus\.documents_digest"):
        extract(tmp_path / "s", dataset=str(tiny_world().more))

    extract(tmp_path / "s", with_index=False)

    assert truth(tmp_path / "s") == truth(finished())


def test_a_drop_that_dies_before_the_files_are_gone_leaves_orphans_for_gc(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(path: object, ignore_errors: bool = False) -> None:
        if not ignore_errors:  # claims of the dead, which are none
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("actstore.store.writer.shutil.rmtree", die)
        with pytest.raises(Killed):
            maintenance.drop(store, RESIDUAL_SAE)
    assert maintenance.verify(store).faults == []
    assert FIRINGS not in StoreReader(store).layout.artifacts

    maintenance.collect_garbage(store)
    extract(store, saes=[tiny_world().residual_sae], with_index=False, **SECOND)

    assert truth(store) == truth(finished())


def test_a_drop_of_a_whole_pass_that_dies_does_not_leave_receipts_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: dict[str, Any] = {"saes": [], "lens_k": 0, "lens_sites": [], "predictions": False, "with_index": False}
    extract(tmp_path / "s", **alone)
    complete = truth(tmp_path / "s")

    def die(path: Path, ignore_errors: bool = False) -> None:
        remove(path, ignore_errors=ignore_errors)
        if not ignore_errors:
            raise Killed  # arrays are gone, the pass's manifests are not

    remove = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr("actstore.store.writer.shutil.rmtree", die)
        with pytest.raises(Killed):
            maintenance.drop(tmp_path / "s", "resid_post.1")
    assert extract(tmp_path / "s", **alone).n_shards_made > 1
    assert truth(tmp_path / "s") == complete and maintenance.verify(tmp_path / "s").ok


def test_labels_survive_a_death_while_they_are_written(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = store.parent / "labels.csv"
    labels.write_text(f"sae,feature,label\n{RESIDUAL_SAE},1,first\n")
    maintenance.label(store, labels)
    labels.write_text(f"sae,feature,label\n{RESIDUAL_SAE},1,second\n")

    def die(source: Path, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("actstore.sealed.publish", die)
        with pytest.raises(Killed):
            maintenance.label(store, labels)

    assert StoreReader(store).labels() == [(RESIDUAL_SAE, 1, "first")]


def test_a_sealing_that_dies_half_way_is_finished_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: Path, missing_ok: bool = False) -> None:
        if self.parent.name == "receipts":
            raise Killed
        unlink(self, missing_ok)

    unlink = Path.unlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(Killed):
            extract(tmp_path / "s", with_index=False)
    assert maintenance.verify(tmp_path / "s").faults == []
    assert list(StoreReader(tmp_path / "s").done(SITE)) == list(StoreReader(finished()).done(SITE))

    writer = StoreWriter.open(tmp_path / "s")
    assert PassWriter(writer, writer.layout.passes[0]).pending() == []
    extract(tmp_path / "s", report=stopping_after(10**9), with_index=False)

    assert not list((tmp_path / "s").glob("passes/*/receipts/*.json"))
    assert truth(tmp_path / "s") == truth(finished())
