"""A store from elsewhere: sealed as a real one, and saying what it likes; it is refused where it is read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from store_support import copy_of_finished, finished, hashes, reseal
from tiny_world import RESIDUAL_SAE

import actstore
from actstore import maintenance
from actstore.errors import ActstoreError, CorruptStore
from actstore.sealed import read_sealed, write_sealed
from actstore.store import StoreFile, StoreReader, StoreWriter, write_piece

JUNK: list[Any] = [None, True, -1, 0.5, 1 << 40, 10**19, "", "x", "..", "../../victim", "/etc", [], [[]], {}, {"x": []}]
N_CHANGES = 40  # of each document, of some hundreds that there are


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A copy of the finished store, with labels."""
    made = copy_of_finished(tmp_path)
    write_sealed(made / "labels.json", {"labels": {RESIDUAL_SAE: {"3": "cats"}}})
    return made


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory beside the store that is nobody's business."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.txt").write_text("mine")
    return victim


def documents(store: Path) -> dict[str, str]:
    """Return a sealed document of every kind, by its kind."""
    (pass_id,) = StoreReader(store).passes
    return {
        "store": "store.json",
        "layout": "layout.json",
        "labels": "labels.json",
        "pass": f"passes/{pass_id}/pass.json",
        "manifest": f"passes/{pass_id}/sealed-0.json",
        "corpus": "passes/corpus/sealed-0.json",
    }


def use(store: Path) -> None:
    """Read something of everything that a store says of itself."""
    reader = StoreReader(store)
    reader.tables()
    reader.labels()
    for sae in [row["sae"] for row in reader.saes]:
        reader.firings(sae, 0)
        reader.feature_logits(sae)
        reader.kit_piece(reader.kit_digest(f"sae/{sae}", f"firings/{sae}"))
    for site in [row["site"] for row in reader.sites]:
        reader.matrix(f"sites/{site}", 0)
    reader.tokens(0)
    reader.document_text(0)
    reader.vocabulary()


# Names that become paths


PATHS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a pass": lambda body: body["passes"].append("../../victim"),
    "a pass that is absolute": lambda body: body["passes"].append("/victim"),
    "an artifact": lambda body: body["artifacts"].update({"sites/../../../victim": body["passes"][0]}),
    "an artifact of no kind": lambda body: body["artifacts"].update({"passes": body["passes"][0]}),
    "an owner": lambda body: body["artifacts"].update({"sites/resid_post.1": "../../victim"}),
    "an owner that is no pass": lambda body: body["artifacts"].update({"sites/resid_post.1": "0" * 16}),
    "metadata": lambda body: body["metadata"].update({"arrays/../../victim/zarr.json": "0" * 64}),
    "metadata of no array": lambda body: body["metadata"].update({"../sites/resid_post.1/zarr.json": "0" * 64}),
    "a sealed pass": lambda body: body["sealed"].update({"../../victim": [0]}),
}


@pytest.mark.parametrize("change", PATHS.values(), ids=PATHS)
def test_a_layout_names_nothing_outside_the_store(
    store: Path, victim: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    reseal(store / "layout.json", change)
    before = hashes(store.parent)

    for door in (StoreReader, StoreWriter.open, lambda one: maintenance.drop(one, "sites/resid_post.1")):
        with pytest.raises(CorruptStore, match=r"layout\.json.*victim|layout\.json.*(passes|sites|0000)"):
            door(store)

    assert any("layout.json" in fault for fault in maintenance.verify(store).faults)
    assert hashes(store.parent) == before


def test_what_a_pass_makes_lies_in_the_store(store: Path, victim: Path) -> None:
    name = documents(store)["pass"]
    for change in (
        lambda body: body["matrices"][0].update(path="../../victim/x"),
        lambda body: body["matrices"][0].update(path="scales"),
        lambda body: body["firings"][0].update(sae="../victim"),
        lambda body: body["files"].update({"firings/../../victim/precious.txt": {"bytes": 4, "sha256": "0" * 64}}),
        lambda body: body["kit"].update({"../x": "0" * 64}),
        lambda body: body["kit"].update(unembedding="../../victim/precious"),
    ):
        whole = (store / name).read_bytes()
        reseal(store / name, change)
        with pytest.raises(CorruptStore, match=r"pass\.json"):
            use(store)
        assert any("pass.json" in fault for fault in maintenance.verify(store).faults)
        (store / name).write_bytes(whole)


@pytest.mark.parametrize("kind", ["manifest", "corpus"])
@pytest.mark.parametrize(
    "path", ["/dev/zero", "../../victim/precious.txt", "arrays/../../victim/precious.txt", "arrays/x"]
)
def test_a_receipt_proves_nothing_outside_the_store(store: Path, victim: Path, kind: str, path: str) -> None:
    def change(body: dict[str, Any]) -> None:
        (body["receipts"]["0"] if kind == "manifest" else body)["files"][path] = {"bytes": 4, "sha256": "0" * 64}

    name = documents(store)[kind]
    reseal(store / name, change)

    with pytest.raises(CorruptStore, match=Path(name).name):
        use(store)
    assert any(name in fault for fault in maintenance.verify(store).faults)


@pytest.mark.parametrize("key", ["bytes", "sha256", "values_sha256", "chunks_sha256"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "5", "a" * 63, "A" * 64, 10**63, ["a" * 64], {}], ids=repr)
def test_a_proof_of_another_shape_is_refused(store: Path, key: str, value: object) -> None:
    name = documents(store)["manifest"]

    def change(body: dict[str, Any]) -> None:
        files = body["receipts"]["1"]["files"]
        files[min(files)][key] = value

    reseal(store / name, change)

    with pytest.raises(CorruptStore, match=rf"sealed-0\.json.*{key}"):
        StoreReader(store).receipts  # noqa: B018
    assert any(name in fault for fault in maintenance.verify(store).faults)


# Shapes


def test_the_store_of_these_tests_is_read() -> None:
    use(finished())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["store", "layout", "labels", "pass", "manifest", "corpus"])
def test_whatever_a_sealed_document_says_it_is_read_or_refused(store: Path, kind: str) -> None:
    name = documents(store)[kind]
    body = read_sealed(store / name)
    random = np.random.default_rng(20260301)
    places = list(places_in(body))
    chosen = [places[number] for number in random.permutation(len(places))[:N_CHANGES]]
    for place, junk in zip(chosen, random.choice(len(JUNK), N_CHANGES).tolist(), strict=False):
        write_sealed(store / name, with_junk(body, place, JUNK[junk]))
        outcomes = [refused(use, store), refused(maintenance.verify, store)]
        assert [one for one in outcomes if one is not None] == [], (place, JUNK[junk])


def places_in(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value in a document, by keys and places."""
    if place:
        yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places_in(one, (*place, key))


def with_junk(body: dict[str, Any], place: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(body)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = junk
    return dict(changed)


def refused(door: Callable[[Path], object], store: Path) -> str | None:
    """Return None where a store is read or refused with a next step; else what went wrong."""
    try:
        door(store)
    except ActstoreError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", ["store.json", "layout.json", "labels.json"])
@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"\xff", b""],
    ids=["lists", "objects", "a number", "no text", "empty"],
)
def test_what_no_parser_reads_is_refused(store: Path, name: str, data: bytes) -> None:
    (store / name).write_bytes(data)

    with pytest.raises(CorruptStore, match="digest does not match"):
        use(store)
    assert any(name in fault for fault in maintenance.verify(store).faults)


def test_metadata_that_no_parser_reads_is_refused(store: Path) -> None:
    (store / "arrays/sites/resid_post.1/zarr.json").write_bytes(b"[" * 100_000)

    with pytest.raises(CorruptStore, match=r"resid_post\.1"):
        use(store)
    with pytest.raises(CorruptStore, match=r"zarr\.json"):
        maintenance.collect_garbage(store)
    assert any("resid_post.1/zarr.json" in fault for fault in maintenance.verify(store).faults)


@pytest.mark.parametrize(
    "labels",
    [5, [], {"x": 5}, {"x": {"a": "b"}}, {"x": {"-1": "b"}}, {"x": {"99999999999": "b"}}, {"x": {"1": 5}}, None],
    ids=repr,
)
def test_labels_that_are_none_are_refused(store: Path, labels: object) -> None:
    write_sealed(store / "labels.json", {"labels": labels})

    with actstore.open(store) as opened, pytest.raises(CorruptStore, match=r"labels\.json.*Next: "):
        opened.sql("SELECT label FROM features LIMIT 1").arrow()
    assert any("labels.json" in fault for fault in maintenance.verify(store).faults)


@pytest.mark.parametrize(
    ("text", "bounds"),
    [(b"abc", [0, 1 << 40]), (b"abc", [0, 3, 1, 3]), (b"\xff\xfe", [0, 2]), (b"abc", [0, -5])],
    ids=["past the end", "backwards", "no UTF-8", "negative"],
)
def test_a_vocabulary_of_other_bounds_is_refused(store: Path, text: bytes, bounds: list[int]) -> None:
    arrays: dict[str, tuple[npt.NDArray[Any], tuple[str, ...]]] = {
        "text": (np.frombuffer(text, dtype=np.uint8), ("byte",)),
        "bounds": (np.array(bounds, dtype=np.int64), ("token_bound",)),
    }
    digest = write_piece(store, arrays, {})
    reseal(store / "store.json", lambda body: body.update(vocabulary=digest))

    with pytest.raises(CorruptStore, match="Texts are not what was written"):
        StoreReader(store).vocabulary()


def test_a_document_of_a_later_release_says_what_is_not_known() -> None:
    body = read_sealed(finished() / "store.json")

    with pytest.raises(CorruptStore, match=r"'temperature', which is not known.*newer actstore"):
        StoreFile.from_json({**body, "temperature": 1}, "store.json")
