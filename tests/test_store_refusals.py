"""What is refused before anything is changed, and what each message says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models_support import tiny_model
from store_support import copy_of_finished, extract_some, finished, hashes, reseal, truth
from tiny_world import RESIDUAL_SAE, extract, tiny_world

from actstore import maintenance
from actstore.errors import InvalidInput, MissingInput, RecipeMismatch, UnsupportedFormat
from actstore.store import StoreReader, StoreWriter

SECOND: dict[str, Any] = {"dataset": None, "sites": [], "lens_k": 0, "lens_sites": [], "into": True}


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    with pytest.raises(InvalidInput, match=r"out is a file.*new, empty or a store"):
        extract(tmp_path / "out")

    assert (tmp_path / "out").read_text() == "mine"


def test_a_directory_with_other_things_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")

    with pytest.raises(InvalidInput, match=r"thesis\.tex.*choose another --out"):
        extract(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["verify", "drop", "index", "collect_garbage"])
def test_where_no_store_is_nothing_can_be_done(tmp_path: Path, name: str) -> None:
    arguments = [tmp_path / "none", *(["predictions"] if name == "drop" else [])]

    with pytest.raises(MissingInput, match="none"):
        getattr(maintenance, name)(*arguments)


@pytest.mark.parametrize(
    "use",
    [StoreReader, StoreWriter.open, extract, maintenance.index, lambda store: maintenance.drop(store, "predictions")],
    ids=["read", "write", "extract", "index", "drop"],
)
def test_a_store_of_a_newer_format_is_left_alone(tmp_path: Path, use: Callable[[Path], object]) -> None:
    store = copy_of_finished(tmp_path)
    reseal(store / "store.json", lambda body: body.update(version=2, something_new=[1]))
    before = hashes(store)

    with pytest.raises(UnsupportedFormat, match=r"version 2.*version 1.*newer actstore"):
        use(store)

    assert hashes(store) == before


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "sites": ({"sites": ["resid_post.0"]}, r"sites: resid_post\.1 → resid_post\.0"),
    "lens": ({"lens_k": 2}, "lens_k: 3 → 2"),
    "bits": ({"activation_bits": 23}, "activation_bits: 10 → 23"),
    "dtype": ({"dtype": "bfloat16", "storage_dtype": "float32"}, "compute_dtype: float32 → bfloat16"),
    "no predictions": ({"predictions": False}, "predictions: True → False"),
    "other documents": ({"dataset": "more"}, r"corpus\.documents_digest"),
    "fewer SAEs": ({"saes": []}, f"sae {RESIDUAL_SAE}: there → none"),
}


@pytest.mark.parametrize(("options", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_another_recipe_is_refused_with_the_fields_that_differ(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    store = copy_of_finished(tmp_path)
    before = hashes(store)
    if options.get("dataset") == "more":
        options = {"dataset": str(tiny_world().more)}

    with pytest.raises(RecipeMismatch, match=message) as raised:
        extract(store, **options)

    assert "--into" in str(raised.value)
    assert hashes(store) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"context": 12}, "context 24, and 12"), ({"shard_rows": 128}, "shard_rows 64, and 128")],
    ids=["context", "shard rows"],
)
def test_windows_of_a_store_are_for_ever(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        extract(finished(), **options)


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    """The same shape and tokenizer, other weights."""
    folder = tmp_path / tiny_world().model.name
    folder.mkdir()
    for path in tiny_world().model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").unlink()
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny_world().model)
    tiny_model(99, **{name: getattr(config, name) for name in SIZES}).save_pretrained(folder)
    return folder


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def test_a_further_pass_needs_the_stores_own_model(tmp_path: Path, other_model: Path) -> None:
    store = copy_of_finished(tmp_path)
    before = hashes(store)

    with pytest.raises(RecipeMismatch, match=r"model\.weights_digest.*own model and corpus"):
        extract(store, model=str(other_model), saes=[tiny_world().attention_sae], **SECOND)

    assert hashes(store) == before


def test_a_further_pass_needs_the_stores_own_documents(tmp_path: Path) -> None:
    store = copy_of_finished(tmp_path)
    before = hashes(store)

    with pytest.raises(RecipeMismatch, match=r"corpus\.documents_digest"):
        extract(store, saes=[tiny_world().attention_sae], **(SECOND | {"dataset": str(tiny_world().more)}))

    assert hashes(store) == before


@pytest.mark.parametrize(
    ("options", "artifact"),
    [
        ({"saes": ["sae"]}, f"firings/{RESIDUAL_SAE}"),
        ({"saes": [], "sites": ["resid_post.0", "resid_post.1"]}, r"sites/resid_post\.1"),
    ],
    ids=["SAE", "site"],
)
def test_what_is_stored_is_not_made_again(tmp_path: Path, options: dict[str, Any], artifact: str) -> None:
    store = copy_of_finished(tmp_path)
    before = hashes(store)
    options = options | {"saes": [tiny_world().residual_sae for _ in options["saes"]]}

    with pytest.raises(InvalidInput, match=rf"{artifact} is stored already.*actstore drop"):
        extract(store, **(SECOND | options))

    assert hashes(store) == before


def test_nothing_can_be_added_to_a_store_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="leave out --into and --append"):
        extract(tmp_path / "s", **(SECOND | {"dataset": str(tiny_world().dataset), "sites": ["resid_post.0"]}))


# Another device


@pytest.fixture
def begun_elsewhere(tmp_path: Path) -> Path:
    """A store whose first two shards say that they were made on a GPU."""
    store = tmp_path / "s.act"
    extract_some(store, 2)
    for receipt in store.glob("passes/*/receipts/*.json"):
        reseal(receipt, lambda body: body["provenance"].update(device_type="cuda"))
    return store


def test_a_pass_is_not_continued_on_another_kind_of_device(begun_elsewhere: Path) -> None:
    before = truth(begun_elsewhere)

    with pytest.raises(InvalidInput, match=r"begun on cuda, this run is on cpu.*--mixed"):
        extract(begun_elsewhere, with_index=False)

    assert truth(begun_elsewhere) == before


def test_unless_that_is_wanted_and_then_it_is_recorded(begun_elsewhere: Path) -> None:
    assert extract(begun_elsewhere, mixed=True, with_index=False).complete

    receipts = next(iter(StoreReader(begun_elsewhere).receipts.values()))
    assert [one["provenance"]["device_type"] for one in receipts.values()][:3] == ["cuda", "cuda", "cpu"]
    assert truth(begun_elsewhere) == truth(finished())


def test_an_append_that_is_refused_adds_no_segment(tmp_path: Path) -> None:
    store, world = copy_of_finished(tmp_path), tiny_world()
    before = hashes(store, "passes", "arrays")
    sites = ["resid_post.1", "resid_pre.1"]  # the first is stored already, by another pass
    with pytest.raises(InvalidInput, match="stored already"):
        extract(store, into=True, dataset=None, append=str(world.more), sites=sites, saes=[], lens_sites=())
    assert hashes(store, "passes", "arrays") == before
