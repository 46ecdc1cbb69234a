"""Checkpoints of every architecture: what a folder tells, what loading it gives, and the habits of published files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models_support import CASES, Case, captured, token_batch
from safetensors.torch import load_file, save_file

from actstore.errors import InvalidInput
from actstore.models import describe_model, load_model, prove
from actstore.sites import Site

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "model"
    case.model().save_pretrained(path)
    return path


def test_a_folder_describes_the_model_that_is_loaded_from_it(case: Case, folder: Path) -> None:
    description, loaded, in_memory = describe_model(folder), load_model(folder), load_model(case.model())
    assert description.facts == loaded.facts and description.sites() == loaded.sites() == in_memory.sites()
    assert loaded.facts.n_parameters == in_memory.facts.n_parameters
    assert [description.site_width(site) for site in loaded.sites()] == [
        in_memory.site_width(site) for site in in_memory.sites()
    ]
    assert description.config_digest == in_memory.identity.config_digest


def test_a_saved_model_computes_what_it_did(case: Case, folder: Path) -> None:
    batch, last = token_batch((9, 4)), Site("resid_post", 2)
    saved, in_memory = (captured(model, *batch, last)[last] for model in map(load_model, (folder, case.model())))
    assert torch.equal(saved, in_memory)


def test_float16_is_refused_and_widened_where_asked(case: Case, tmp_path: Path) -> None:
    case.model(torch.float16).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match=r"float16.*Accepted: float32 or bfloat16"):
        load_model(tmp_path)
    assert load_model(tmp_path, dtype="bfloat16").dtype == "bfloat16"
    widened = load_model(tmp_path, dtype="float32")
    prove(widened, widened.sites())


def _without_prefix_with_masks(weights: Tensors) -> Tensors:
    """The first GPT-2 files: the body alone, and each layer's causal mask."""
    masks = {f"h.{layer}.attn.bias": torch.tril(torch.ones(1, 1, 64, 64)) for layer in range(3)}
    return {name.removeprefix("transformer."): tensor for name, tensor in weights.items()} | masks


def _with_old_head_name_and_masks(weights: Tensors) -> Tensors:
    """The Pythia files: the head's old name, masks, and the frequencies of the rotation."""
    renamed = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in weights.items()}
    layer = "gpt_neox.layers.0.attention"
    return renamed | {
        f"{layer}.bias": torch.tril(torch.ones(1, 1, 64, 64)),
        f"{layer}.masked_bias": torch.tensor(-1e9),
        f"{layer}.rotary_emb.inv_freq": torch.ones(2),
    }


def _with_frequencies(weights: Tensors) -> Tensors:
    """The Llama 2 files keep the frequencies of the rotation in every layer."""
    return weights | {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(5) for layer in range(3)}


def _with_a_copy_of_the_head(weights: Tensors) -> Tensors:
    """A tied head that was written all the same."""
    return weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}


@pytest.mark.parametrize(
    ("name", "rewrite"),
    [
        pytest.param("gpt_2", _without_prefix_with_masks, id="gpt_2"),
        pytest.param("gpt_2", _with_a_copy_of_the_head, id="gpt_2_with_its_head"),
        pytest.param("pythia", _with_old_head_name_and_masks, id="pythia"),
        pytest.param("llama", _with_frequencies, id="llama_2"),
    ],
)
def test_the_habits_of_published_files_change_nothing(
    tmp_path: Path, name: str, rewrite: Callable[[Tensors], Tensors]
) -> None:
    CASES[name].model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(rewrite(load_file(file)), file, metadata={"format": "pt"})
    batch, site = token_batch((9, 4)), Site("resid_post", 2)
    model, expected = load_model(tmp_path), load_model(CASES[name].model())
    assert torch.equal(captured(model, *batch, site)[site], captured(expected, *batch, site)[site])
    assert torch.equal(model.unembedding().weight, expected.unembedding().weight)


def test_a_head_that_is_neither_tied_nor_there_is_refused(tmp_path: Path) -> None:
    CASES["llama"].model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=r"1 tensors are missing \(lm_head\.weight"):
        load_model(tmp_path)


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    CASES["gpt_2"].model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"] * 2}, file, metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match="head"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "softcap", "norm", "has_bias"),
    [
        pytest.param("gemma_2", 30.0, "rms", False, id="gemma_2"),
        pytest.param("gemma_3_with_images", None, "rms", False, id="gemma_3"),
        pytest.param("llama_with_biases_tied", None, "rms", False, id="llama"),
        pytest.param("gpt_2", None, "layer", True, id="gpt_2"),
        pytest.param("pythia", None, "layer", True, id="pythia"),
    ],
)
def test_the_unembedding_says_its_norm(name: str, softcap: float | None, norm: str, has_bias: bool) -> None:
    unembedding = load_model(CASES[name].model()).unembedding()
    assert (unembedding.softcap, unembedding.norm, unembedding.bias is not None) == (softcap, norm, has_bias)
