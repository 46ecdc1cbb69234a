"""A model that accelerate spread over devices is the model on one; here the devices are memory and the files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models_support import CASES, N_LAYERS, Case, captured, token_batch
from safetensors.torch import load_file, save_file
from tiny_world import extract, tiny_world

from actstore.errors import InvalidInput, MissingDependency
from actstore.models import LoadedModel, load_model, prove
from actstore.sites import Site
from actstore.store import StoreReader

BATCH = token_batch((11, 6, 1))


def device_map(case: Case, *on_disk: str) -> dict[str, int | str]:
    """Return a place for every module: these in the checkpoint's files, all others in memory."""
    with torch.device("meta"):
        model = getattr(transformers, case.architecture)._from_config(case.config())
    places: dict[str, int | str] = {}

    def place(path: str, module: torch.nn.Module) -> None:
        if path not in on_disk and any(one.startswith(f"{path}.") for one in on_disk):
            for name, child in module.named_children():
                place(f"{path}.{name}", child)
        else:
            places[path] = "disk" if path in on_disk else "cpu"

    for name, child in model.named_children():
        place(name, child)
    return places


def half_on_disk(case: Case) -> dict[str, int | str]:
    """Return a map with both ends and two of three layers in files: everything that is not only run, but read."""
    layout = case.layout
    layers = [f"{layout.layers}.{index}" for index in (0, 2)]
    return device_map(case, "lm_head", layout.embedding, layout.final_norm, *layers)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spread") / "model"
    case.model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> LoadedModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def spread(case: Case, folder: Path) -> LoadedModel:
    return load_model(folder, device_map=half_on_disk(case))


def n_absent(model: LoadedModel) -> int:
    """Return how many parameters hold no numbers at present."""
    return sum(parameter.is_meta for parameter in model.causal_lm.parameters())


def test_every_site_is_the_same(plain: LoadedModel, spread: LoadedModel) -> None:
    assert n_absent(spread) > 20 and n_absent(plain) == 0
    found, expected = (captured(model, *BATCH, *model.sites()) for model in (spread, plain))
    assert found.keys() == expected.keys()
    for site, values in found.items():
        assert values.device == spread.device and torch.equal(values, expected[site]), site


def test_facts_identity_and_proofs_are_the_same(plain: LoadedModel, spread: LoadedModel) -> None:
    assert (spread.facts, spread.identity, spread.dtype) == (plain.facts, plain.identity, plain.dtype)
    assert prove(spread, spread.sites()) == prove(plain, plain.sites())


def test_the_weights_that_lenses_need_are_fetched_and_let_go(plain: LoadedModel, spread: LoadedModel) -> None:
    absent = n_absent(spread)

    def weights(model: LoadedModel) -> list[torch.Tensor | None]:
        unembedding = model.unembedding()
        outputs = [part for index in range(N_LAYERS) for part in model.attention_output(index)]
        downs = [part for index in range(N_LAYERS) for part in model.projection(model.family.mlp_output, index)]
        positions = model.embedded(torch.ones(2, model.facts.d_model), torch.tensor([0, 3]))
        return [unembedding.gain, unembedding.weight, unembedding.bias, *outputs, *downs, positions]

    for found, expected in zip(weights(spread), weights(plain), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or (expected is not None and torch.equal(found, expected))
    assert n_absent(spread) == absent


def test_a_pass_that_stops_early_leaves_nothing_behind(plain: LoadedModel, spread: LoadedModel) -> None:
    absent, site = n_absent(spread), Site("z", 0)
    for _ in range(2):
        assert torch.equal(captured(spread, *BATCH, site)[site], captured(plain, *BATCH, site)[site])
    assert n_absent(spread) == absent


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    CASES["gemma_2"].model().save_pretrained(tmp_path / "gemma")
    return tmp_path / "gemma"


def test_all_of_a_model_in_files(gemma: Path) -> None:
    everything = load_model(gemma, device_map={"": "disk"})
    assert everything.spread == ("all: disk",) and everything.device == torch.device("cpu")
    site = Site("final")
    assert torch.equal(captured(everything, *BATCH, site)[site], captured(load_model(gemma), *BATCH, site)[site])


def test_the_map_is_told_in_runs(gemma: Path) -> None:
    assert load_model(gemma, device_map=half_on_disk(CASES["gemma_2"])).spread == (
        "model.embed_tokens to model.layers.0: disk",
        "model.layers.1: cpu",
        "model.layers.2 to model.norm: disk",
        "model.rotary_emb: cpu",
        "lm_head: disk",
    )
    assert load_model(gemma).spread is None


def test_auto_on_one_device_with_room_is_that_device(gemma: Path) -> None:
    model = load_model(gemma, device_map="auto")
    assert n_absent(model) == 0 and model.spread is None


def test_a_dtype_other_than_the_files_is_computed_in(gemma: Path) -> None:
    spread = load_model(gemma, dtype="bfloat16", device_map=half_on_disk(CASES["gemma_2"]))
    plain = load_model(gemma, dtype="bfloat16")
    assert spread.dtype == "bfloat16"
    found, expected = (captured(model, *BATCH, *model.sites()) for model in (spread, plain))
    assert all(torch.equal(values, expected[site]) for site, values in found.items())


def _rewrite(folder: Path, **changes: torch.Tensor) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | changes, file, metadata={"format": "pt"})


def test_a_tied_head_in_the_files_is_accepted_only_where_it_is_the_embedding(gemma: Path) -> None:
    embedding = load_file(gemma / "model.safetensors")["model.embed_tokens.weight"]
    places = half_on_disk(CASES["gemma_2"])
    _rewrite(gemma, **{"lm_head.weight": embedding.clone()})
    assert torch.equal(load_model(gemma, device_map=places).unembedding().weight, embedding)
    _rewrite(gemma, **{"lm_head.weight": embedding * 2})
    with pytest.raises(InvalidInput, match="ties the head to the embedding"):
        load_model(gemma, device_map=places)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        pytest.param(torch.full((24,), torch.nan), "gemma hold NaN or infinity: model.norm.weight", id="nan"),
        pytest.param(torch.ones(1), r"cannot be read: .*shape.*\[24\]", id="shape"),
    ],
)
def test_weights_in_files_are_checked_too(gemma: Path, weight: torch.Tensor, message: str) -> None:
    _rewrite(gemma, **{"model.norm.weight": weight})
    with pytest.raises(InvalidInput, match=message):
        load_model(gemma, device_map=half_on_disk(CASES["gemma_2"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"device_map": "auto", "device": "cpu"}, "one of --device and --device-map", id="device_too"),
        pytest.param({"device_map": "balanced"}, "'balanced' is not known.*'auto'", id="unknown"),
        pytest.param({"device_map": {"model.norm": "disk"}}, "check the device map", id="modules_left_out"),
    ],
)
def test_a_device_map_that_cannot_be_is_refused(gemma: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_model(gemma, **options)


def test_a_model_in_memory_is_not_spread(gemma: Path) -> None:
    with pytest.raises(InvalidInput, match=r"in memory is never moved.*give its folder"):
        load_model(CASES["gemma_2"].model(), device_map="auto")
    spread = load_model(gemma, device_map=half_on_disk(CASES["gemma_2"])).causal_lm
    with pytest.raises(InvalidInput, match=r"spread over .*give its folder or hub id, and device_map='auto'"):
        load_model(spread)


def test_without_accelerate_the_install_line_is_shown(gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_accelerate_available", lambda: False)
    with pytest.raises(MissingDependency, match=r"accelerate.*pip install 'actstore\[multi-gpu\]'"):
        load_model(gemma, device_map="auto")
    load_model(gemma)


def _digests(store: Path) -> dict[str, str]:
    """Return the digest of every file but those that tell when, and with what provenance, the others were made."""
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and not {"journal", "receipts", "store.json", "sealed-0.json"} & set(path.parts)
    }


def _places(store: Path) -> list[list[str] | None]:
    return [one["provenance"]["device_map"] for made in StoreReader(store).receipts.values() for one in made.values()]


def test_an_extraction_is_the_same_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, plain, spread = tiny_world(), tmp_path / "plain.act", tmp_path / "spread.act"
    asked: dict[str, Any] = {
        "saes": [world.residual_sae, world.attention_sae],
        "sites": ["embed_raw", "resid_post.*", "final"],
        "with_index": False,
    }
    expected = extract(plain, **asked)
    room = sum(file.stat().st_size for file in world.model.glob("*.safetensors")) // 2
    monkeypatch.setattr("transformers.integrations.accelerate.accelerate_max_memory", lambda _asked: {"cpu": room})
    found = extract(spread, device="auto", device_map="auto", **asked)
    assert found.pass_id == expected.pass_id and found.complete
    assert _digests(spread) == _digests(plain) and len(_digests(plain)) > 20
    assert all(one is None for one in _places(plain))
    assert all(one is not None and one[-1].endswith("disk") for one in _places(spread))
