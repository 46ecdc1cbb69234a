"""`verify` proves every byte: whatever is changed, wherever, is found and named, and everything at once."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

import numpy as np
import pytest
from store_support import copy_of_finished, extract_some, finished, hashes
from tiny_world import ATTENTION_SAE, RESIDUAL_SAE, extract, tiny_world

from actstore import maintenance
from actstore.errors import CorruptStore, StoreBusy
from actstore.sealed import PARTIAL_SUFFIX
from actstore.store import PassWriter, StoreWriter, verify_store

N_ROUNDS = 10  # in each, one bit is changed in a file of every kind: 210 in all
KINDS = {
    "rows of a site": "arrays/sites/*/c.*",
    "tokens": "arrays/corpus/tokens/c.*",
    "documents": "arrays/corpus/segments/*/c.*",
    "predictions": "arrays/predictions/*/c.*",
    "reconstruction": "arrays/reconstruction/*/c.*",
    "lens": "arrays/lens/*/c.*",
    "metadata of arrays": "arrays/*/*/zarr.json",
    "metadata of groups": "arrays*/zarr.json",
    "firings": "firings/*/[0-9]*.zip",
    "feature logits": "firings/*/feature_logits.zip",
    "kit": "kit/*.zip",
    "receipts": "passes/*/receipts/*.json",
    "manifests": "passes/*/sealed-*.json",
    "passes": "passes/*/pass.json",
    "store": "store.json",
    "layout": "layout.json",
    "labels": "labels.json",
    "journal": "journal/*.jsonl",
    "parts": "index/*.duckdb",
    "catalogs": "index/catalog-*.json",
    "current": "index/CURRENT",
}
LISTS = ("receipts", "manifests", "passes", "store", "layout", "catalogs", "current")  # say what others should be


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that has every kind of file: one pass complete and indexed, a second one stopped after two shards."""
    store = copy_of_finished(tmp_path_factory.mktemp("verify"))
    extract_some(
        store, 2, dataset=None, sites=[], saes=[tiny_world().attention_sae], lens_k=0, lens_sites=[], into=True
    )
    labels = store.parent / "labels.jsonl"
    labels.write_text(f'{{"sae": "{RESIDUAL_SAE}", "feature": 3, "label": "cats"}}\n')
    maintenance.label(store, labels)
    maintenance.index(store)
    maintenance.collect_garbage(store)
    return store


def kind_of(name: str) -> str | None:
    return next((kind for kind, pattern in KINDS.items() if fnmatch.fnmatchcase(name, pattern)), None)


def flip(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_an_undamaged_store_has_no_faults_and_no_orphans(everything: Path) -> None:
    found = maintenance.verify(everything)

    assert (found.faults, found.orphans) == ([], [])
    assert found.n_files == len(
        [name for name in hashes(everything) if not name.startswith(("index", "lock", "claims"))]
    )


def test_every_single_bit_flip_is_found_and_named(everything: Path) -> None:
    by_kind = files_by_kind(everything)
    before = hashes(everything)
    random = np.random.default_rng(20260101)
    for _ in range(N_ROUNDS):
        chosen = {kind: str(random.choice(sorted(names))) for kind, names in by_kind.items()}
        assert find_flips(everything, [name for kind, name in chosen.items() if kind not in LISTS], random) == []
        for kind in LISTS:
            assert find_flips(everything, [chosen[kind]], random) == []
    assert hashes(everything) == before


def files_by_kind(store: Path) -> dict[str, list[str]]:
    """Return the names of all files, each below its kind; there must be some of each, and no other."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in hashes(store):
        if kind := kind_of(name):
            by_kind[kind].append(name)
        else:
            assert (store / name).stat().st_size == 0, f"{name} is of no kind that this test knows"
    assert all(by_kind.values()), {kind for kind, names in by_kind.items() if not names}
    return by_kind


def find_flips(store: Path, names: list[str], random: np.random.Generator) -> list[str]:
    """Change one random bit of each of these files, verify, change them back; return what was not named."""
    places = [
        (store / name, int(random.integers((store / name).stat().st_size)), int(random.integers(8))) for name in names
    ]
    for place in places:
        flip(*place)
    faults = maintenance.verify(store).faults
    for place in places:
        flip(*place)
    missed = [name for name in names if not any(name.removeprefix("index/") in fault for fault in faults)]
    return [
        f"{path} byte {offset} bit {bit}"
        for path, offset, bit in places
        if missed and str(path).endswith(tuple(missed))
    ]


def test_all_faults_are_named_at_once(everything: Path, tmp_path: Path) -> None:
    store = copy_of_finished(tmp_path)
    names = sorted(hashes(store))
    damaged = [next(name for name in names if kind_of(name) == kind) for kind in ("firings", "kit", "passes", "parts")]
    for name in damaged:
        flip(store / name, 60, 3)
    missing = "arrays/sites/resid_post.1/c.1.0"
    (store / missing).unlink()

    faults = maintenance.verify(store).faults

    assert [name for name in (*damaged, missing) if not any(Path(name).name in fault for fault in faults)] == []


def test_two_shards_exchanged_are_found(tmp_path: Path) -> None:
    store = copy_of_finished(tmp_path)
    one, other = (store / f"arrays/sites/resid_post.1/c.{shard}.0" for shard in (0, 1))
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)

    assert len(maintenance.verify(store).faults) == 2


@pytest.mark.parametrize(
    "pattern",
    ["kit/*.zip", "arrays/sites/*/zarr.json", "passes/*/pass.json", "layout.json", "store.json", "index/core*"],
)
def test_a_missing_file_is_a_fault(tmp_path: Path, pattern: str) -> None:
    store = copy_of_finished(tmp_path)
    gone = min(store.glob(pattern))
    gone.unlink()

    assert any(gone.name in fault for fault in maintenance.verify(store).faults)


def test_a_receipt_of_another_shard_is_a_fault(everything: Path, tmp_path: Path) -> None:
    extract_some(tmp_path / "s", 2)
    one, other = sorted((tmp_path / "s").glob("passes/*/receipts/*.json"))
    other.write_bytes(one.read_bytes())

    assert any("another shard" in fault for fault in maintenance.verify(tmp_path / "s").faults)


# What gc removes, and what it never does


def test_gc_removes_what_nothing_names_and_nothing_else(tmp_path: Path) -> None:
    store = copy_of_finished(tmp_path)
    before = hashes(store)
    litter = [f"arrays/sites/resid_post.1/c.0.0.abc{PARTIAL_SUFFIX}", f"layout.json.abc{PARTIAL_SUFFIX}"]
    litter += ["arrays/sites/resid_post.2/c.0.0", "firings/dropped/0.zip", f"kit/x.zip{PARTIAL_SUFFIX}"]
    for name in litter:
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(b"left behind")
    assert maintenance.verify(store).ok
    assert sorted(maintenance.verify(store).orphans) == sorted(litter)

    removed = maintenance.collect_garbage(store)

    assert sorted(removed) == sorted(litter)
    assert hashes(store) == before


def test_gc_removes_the_claims_of_the_dead(tmp_path: Path) -> None:
    extract_some(tmp_path / "s", 2)
    claims = tmp_path / "s/claims/x"
    claims.mkdir(parents=True)
    (claims / "5.json").write_text(f'{{"host":"{os.uname().nodename}","pid":{2**22 - 1},"started":"1"}}')

    maintenance.collect_garbage(tmp_path / "s")

    assert not list((tmp_path / "s").glob("claims/**/*.json"))
    assert maintenance.verify(tmp_path / "s").orphans == []


def test_gc_refuses_while_somebody_extracts(tmp_path: Path) -> None:
    store = tmp_path / "s"
    extract_some(store, 2)
    writer = StoreWriter.open(store)
    claim = PassWriter(writer, writer.layout.passes[0]).claim(2)
    assert claim is not None
    litter = store / f"arrays/half.{PARTIAL_SUFFIX}"
    litter.write_bytes(b"being written")

    with claim, pytest.raises(StoreBusy):
        maintenance.collect_garbage(store)
    assert litter.exists()
    maintenance.collect_garbage(store)

    assert not litter.exists()


def test_nobody_can_claim_a_shard_while_gc_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "s"
    extract_some(store, 2)
    writer = StoreWriter.open(store)
    monkeypatch.setattr("actstore.store.claims.LOCK_SECONDS", 0.1)
    refused = []

    def claim_meanwhile(root: Path) -> object:
        with pytest.raises(StoreBusy):
            PassWriter(writer, writer.layout.passes[0]).claim(2)
        refused.append(root)
        return verify_store(root)

    monkeypatch.setattr("actstore.store.sweep.verify_store", claim_meanwhile)
    maintenance.collect_garbage(store)

    assert refused == [store]


@pytest.mark.parametrize("kind", ["manifests", "passes", "layout"])
def test_gc_removes_nothing_where_a_list_of_files_is_damaged(tmp_path: Path, kind: str) -> None:
    store = copy_of_finished(tmp_path)
    for name in [name for name in hashes(store) if kind_of(name) == kind]:
        flip(store / name, 10, 1)
    before = hashes(store)

    with pytest.raises(CorruptStore, match="verify"):
        maintenance.collect_garbage(store)

    assert hashes(store) == before


def test_a_journal_that_a_dead_run_left_torn_is_no_fault(tmp_path: Path) -> None:
    store = copy_of_finished(tmp_path)
    journal = next((store / "journal").iterdir())
    journal.write_bytes(journal.read_bytes()[:-20])

    found = maintenance.verify(store)

    assert found.ok
    assert len(found.orphans) == 1


def test_verifying_changes_nothing() -> None:
    before = hashes(finished())

    maintenance.verify(finished())

    assert hashes(finished()) == before


def test_the_second_pass_is_there_to_be_resumed(everything: Path, tmp_path: Path) -> None:
    outcome = extract(
        everything,
        dataset=None,
        sites=[],
        saes=[tiny_world().attention_sae],
        lens_k=0,
        lens_sites=[],
        into=True,
    )

    assert outcome.complete
    assert outcome.n_shards_made == StoreWriter.open(everything).layout.n_shards - 2
    assert f"firings/{ATTENTION_SAE}" in StoreWriter.open(everything).layout.artifacts
    assert maintenance.verify(everything).ok
