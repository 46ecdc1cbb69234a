"""Names that are looked up: Gemma Scope 2's in the hub's cache, all others as SAELens' registry has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from registry_support import empty_hub, named
from saes_support import plain_tensors, write_gemma_scope_2, write_llama_scope, write_saelens
from safetensors.numpy import load_file

from actstore.errors import ActstoreError, InvalidInput, MissingDependency, UnknownName, UnsupportedFormat
from actstore.saes import ResolvedSae, SaeEncoder, expand_sae_arguments, load_sae

torch.set_num_threads(1)

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty_hub(monkeypatch, tmp_path / "hub")


# --- Gemma Scope 2


def _of_hub(tmp_path: Path, repository: str, folder: str) -> Path:
    """Return the folder of a repository in the hub's cache."""
    home = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    inside = home / "snapshots" / COMMIT / folder
    inside.parent.mkdir(parents=True, exist_ok=True)
    return inside


@pytest.mark.parametrize(
    ("name", "folder", "sae", "neuronpedia"),
    [
        pytest.param(
            "saelens:gemma-scope-2-1b-pt-res/layer_13_width_16k_l0_medium",
            "resid_post/layer_13_width_16k_l0_medium",
            "13-gemmascope-2-res-16k",
            "gemma-3-1b/13-gemmascope-2-res-16k",
            id="what_neuronpedia_has",
        ),
        pytest.param(
            "neuronpedia:gemma-3-1b/13-gemmascope-2-res-16k",
            "resid_post/layer_13_width_16k_l0_medium",
            "13-gemmascope-2-res-16k",
            "gemma-3-1b/13-gemmascope-2-res-16k",
            id="neuronpedia",
        ),
        pytest.param(
            "saelens:gemma-scope-2-1b-pt-res/layer_13_width_16k_l0_big_seed_1",
            "resid_post/layer_13_width_16k_l0_big_seed_1",
            "13-gemmascope-2-res-16k__l0-big-seed-1",
            None,
            id="another_sparsity",
        ),
        pytest.param(
            "saelens:gemma-scope-2-1b-pt-res-all/layer_13_width_16k_l0_small",
            "resid_post_all/layer_13_width_16k_l0_small",
            "13-gemmascope-2-res-16k__all-l0-small",
            None,
            id="every_layer",
        ),
        pytest.param(
            "google/gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium",
            "resid_post/layer_13_width_16k_l0_medium",
            "13-gemmascope-2-res-16k",
            "gemma-3-1b/13-gemmascope-2-res-16k",
            id="path",
        ),
    ],
)
def test_names_of_gemma_scope_2(tmp_path: Path, name: str, folder: str, sae: str, neuronpedia: str | None) -> None:
    written = write_gemma_scope_2(tmp_path / "made")
    written.rename(_of_hub(tmp_path, "google/gemma-scope-2-1b-pt", folder))
    assert named(name) == [(sae, f"google/gemma-scope-2-1b-pt/{folder}", neuronpedia)]
    identity = load_sae(expand_sae_arguments([name])[0]).identity
    assert (identity.release, identity.sae_id) == ("google/gemma-scope-2-1b-pt", folder)
    assert (identity.neuronpedia_id, identity.revision) == (neuronpedia, COMMIT)


def test_a_transcoder_of_gemma_scope_2_names_its_folder_in_its_id(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "type": "transcoder",
        "hf_hook_point_in": "model.layers.13.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.13.post_feedforward_layernorm.output",
    }
    folder = "transcoder/layer_13_width_16k_l0_big"
    write_gemma_scope_2(tmp_path / "made", **changes).rename(_of_hub(tmp_path, "google/gemma-scope-2-1b-pt", folder))
    release = "saelens:gemma-scope-2-1b-pt-transcoders"
    found = named(f"{release}/{folder}")
    assert found == named(f"{release}/layer_13_width_16k_l0_big")
    assert found[0][0] == "13-gemmascope-2-transcoder-16k__l0-big"


# --- The registry

REGISTRY = """
gpt2-small-res-jb:
  repo_id: own/gpt2
  model: gpt2-small
  conversion_func: null
  config_overrides:
    model_from_pretrained_kwargs:
      center_writing_weights: true
  saes:
  - {id: blocks.3.hook_resid_pre, path: sae, l0: 12.0, neuronpedia: gpt2-small/3-res-jb}
  - {id: blocks.11.hook_resid_pre, path: later, neuronpedia: gpt2-small/11-res-jb}
scaled:
  repo_id: own/scaled
  model: gemma-2b
  conversion_func: null
  saes:
  - {id: blocks.3.hook_resid_pre, path: sae, norm_scaling_factor: 2.5}
normalised:
  repo_id: own/normalised
  model: mistral-7b
  conversion_func: null
  config_overrides: {normalize_activations: constant_norm_rescale, dataset_path: some/text}
  saes:
  - {id: blocks.3.hook_resid_pre, path: sae}
llama:
  repo_id: own/llama
  model: llama
  conversion_func: llama_scope
  saes:
  - {id: l15r_8x, path: Llama3_1-8B-Base-L15R-8x, norm_scaling_factor: 0.372, neuronpedia: llama/15-llamascope-res-32k}
changed:
  repo_id: own/llama
  model: llama
  conversion_func: llama_scope
  config_overrides: {hook_name: blocks.1.hook_resid_post}
  saes:
  - {id: l15r_8x, path: Llama3_1-8B-Base-L15R-8x}
pickled:
  repo_id: own/pickled
  model: gemma-2-2b
  conversion_func: dictionary_learning_1
  saes:
  - {id: trainer_0, path: trainer_0}
foreign:
  repo_id: own/foreign
  model: llama
  conversion_func: goodfire
  saes:
  - {id: layer_50, path: weights.pth, neuronpedia: llama/50-resid-post-gf}
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed sae_lens that has a registry and cannot be imported."""
    package = tmp_path / "site" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "pretrained_saes.yaml").write_text(REGISTRY)
    monkeypatch.syspath_prepend(package.parent)
    return tmp_path


def _on_the_hub(tmp_path: Path, repository: str, written: Path, folder: str = "sae") -> Path:
    inside = _of_hub(tmp_path, repository, folder)
    return written.rename(inside)


@pytest.mark.parametrize(
    "name", ["saelens:gpt2-small-res-jb/blocks.3.hook_resid_pre", "neuronpedia:gpt2-small/3-res-jb"]
)
def test_the_registry_says_where_and_who(registry: Path, name: str) -> None:
    _on_the_hub(registry, "own/gpt2", write_saelens(registry / "made", plain_tensors()))
    (found,) = expand_sae_arguments([name])
    identity = load_sae(found).identity
    assert (identity.sae, identity.site, identity.revision) == ("3-res-jb", "resid_pre.3", COMMIT)
    assert (identity.release, identity.sae_id) == ("gpt2-small-res-jb", "blocks.3.hook_resid_pre")
    assert identity.neuronpedia_id == "gpt2-small/3-res-jb"
    assert "sae_lens" not in sys.modules
    assert expand_sae_arguments([f"mine={name}@resid_pre.3"])[0].sae == "mine"


@pytest.mark.parametrize("name", ["saelens:gpt2-small-res-jb/*", "neuronpedia:gpt2-small/*-res-jb"])
def test_a_pattern_takes_every_layer_in_order(registry: Path, name: str) -> None:
    for folder in ("sae", "later"):
        layer = {"sae": 3, "later": 11}[folder]
        metadata = {"model_name": "gpt2", "hook_name": f"blocks.{layer}.hook_resid_pre"}
        written = write_saelens(registry / folder, plain_tensors(), metadata=metadata)
        _on_the_hub(registry, "own/gpt2", written, folder)
    assert [sae.sae for sae in expand_sae_arguments([name])] == ["3-res-jb", "11-res-jb"]


def test_without_a_source_on_neuronpedia_the_id_is_the_registrys(registry: Path) -> None:
    _on_the_hub(registry, "own/normalised", write_saelens(registry / "made", plain_tensors()))
    (found,) = expand_sae_arguments(["saelens:normalised/blocks.3.hook_resid_pre"])
    assert (found.sae, found.neuronpedia_id) == ("normalised-blocks.3.hook_resid_pre", None)


ROWS = np.random.default_rng(3).normal(size=(64, 10)).astype(np.float32) * 2 + 0.5


def _features(found: ResolvedSae) -> npt.NDArray[np.float32]:
    coder = load_sae(found)
    tile = SaeEncoder(coder, "cpu").encode(torch.from_numpy(ROWS))
    features = np.zeros((len(ROWS), coder.d_sae), np.float32)
    features[np.repeat(np.arange(len(ROWS)), tile.counts.numpy()), tile.features.numpy()] = tile.activations.numpy()
    decoded = features @ coder.w_dec + coder.b_dec
    if coder.normalisation == "none":
        error = np.linalg.norm(ROWS - decoded, axis=1)
        np.testing.assert_allclose(tile.reconstruction[:, 2].numpy(), error, rtol=1e-4)
    return features


def _expected(folder: Path, z: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    t = {name: array.astype(np.float64) for name, array in load_file(folder / "sae_weights.safetensors").items()}
    return np.asarray(np.maximum((z - t["b_dec"]) @ t["W_enc"] + t["b_enc"], 0))


@pytest.mark.parametrize("said", [True, "expected_average_only_in"])
def test_the_registrys_scale_multiplies_what_is_read(registry: Path, said: object) -> None:
    old: dict[str, Any] = {"metadata": None, "hook_name": "blocks.3.hook_resid_pre"} if said is True else {}
    written = write_saelens(registry / "made", plain_tensors(), normalize_activations=said, **old)
    folder = _on_the_hub(registry, "own/scaled", written)
    (found,) = expand_sae_arguments(["saelens:scaled/blocks.3.hook_resid_pre"])
    features = _expected(folder, ROWS * 2.5)
    np.testing.assert_allclose(_features(found), features, rtol=2e-4, atol=2e-5)
    coder, tensors = load_sae(found), load_file(folder / "sae_weights.safetensors")
    np.testing.assert_allclose(coder.b_dec, tensors["b_dec"] / 2.5, rtol=1e-6)
    np.testing.assert_allclose(coder.w_dec, tensors["W_dec"] / 2.5, rtol=1e-6)
    assert coder.identity.architecture == "standard x-b_dec scale=2.5"
    with pytest.raises(UnsupportedFormat, match="the scale is not in the folder"):
        expand_sae_arguments(["own/scaled/sae"])


def test_a_scale_that_the_configuration_does_not_ask_for_changes_nothing(registry: Path) -> None:
    folder = _on_the_hub(registry, "own/scaled", write_saelens(registry / "made", plain_tensors()))
    (found,) = expand_sae_arguments(["saelens:scaled/blocks.3.hook_resid_pre"])
    np.testing.assert_allclose(_features(found), _expected(folder, ROWS), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("old", [True, False], ids=["flat", "with_metadata"])
def test_overrides_of_the_registry_are_part_of_the_equation(registry: Path, old: bool) -> None:
    changes: dict[str, Any] = {"model_name": "gpt2-small", "hook_name": "blocks.3.hook_resid_pre"}
    written = write_saelens(registry / "made", plain_tensors(), **(changes | {"metadata": None} if old else {}))
    folder = _on_the_hub(registry, "own/gpt2", written)
    (found,) = expand_sae_arguments(["saelens:gpt2-small-res-jb/blocks.3.hook_resid_pre"])
    expected = _expected(folder, ROWS - ROWS.mean(1, keepdims=True))
    np.testing.assert_allclose(_features(found), expected, rtol=2e-4, atol=2e-5)
    identity = load_sae(found).identity
    assert "centred" in identity.architecture
    assert identity.declared_l0 == 12.0


def test_an_overridden_normalisation(registry: Path) -> None:
    folder = _on_the_hub(registry, "own/normalised", write_saelens(registry / "made", plain_tensors()))
    (found,) = expand_sae_arguments(["saelens:normalised/blocks.3.hook_resid_pre"])
    length = np.linalg.norm(ROWS, axis=1, keepdims=True) / np.sqrt(10)
    np.testing.assert_allclose(_features(found), _expected(folder, ROWS / length), rtol=2e-4, atol=2e-5)


def test_llama_scope_says_its_scale_itself(registry: Path) -> None:
    written, _ = write_llama_scope(registry / "made")  # √10 / 8.5 = 0.372
    folder = _on_the_hub(registry, "own/llama", written, written.name)
    (found,) = expand_sae_arguments(["saelens:llama/l15r_8x"])
    assert (found.sae, found.neuronpedia_id) == ("15-llamascope-res-32k", "llama/15-llamascope-res-32k")
    body = (folder / "hyperparams.json").read_text()
    (folder / "hyperparams.json").write_text(body.replace("8.5", "9.5"))
    with pytest.raises(UnsupportedFormat, match=r"norm_scaling_factor is 0\.372 in the registry, and 0\.33"):
        expand_sae_arguments(["saelens:llama/l15r_8x"])


def test_an_override_that_a_format_has_no_place_for(registry: Path) -> None:
    written, _ = write_llama_scope(registry / "made")
    _on_the_hub(registry, "own/llama", written, written.name)
    with pytest.raises(UnsupportedFormat, match="the registry overrides hook_name"):
        expand_sae_arguments(["saelens:changed/l15r_8x"])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("saelens:foreign/layer_50", UnsupportedFormat, "converts with 'goodfire', which is not read"),
        ("neuronpedia:llama/50-resid-post-gf", UnsupportedFormat, "'goodfire'.*from_pretrained"),
        ("saelens:pickled/trainer_0", UnsupportedFormat, "a pickle.*--allow-pt"),
        ("saelens:gpt2-small-res-jd/blocks.3", UnknownName, "Did you mean 'gpt2-small-res-jb'"),
        ("saelens:scaled/blocks.4.hook_resid_pre", UnknownName, "blocks.3.hook_resid_pre"),
        ("neuronpedia:gpt2-small/4-res-jb", UnknownName, "gpt2-small/3-res-jb"),
        ("neuronpedia:gpt2-small/*-res-kk", UnknownName, "gpt2-small/3-res-jb"),
        ("saelens:scaled", InvalidInput, "not complete.*release/sae_id"),
        ("neuronpedia:", InvalidInput, "not complete.*model/source"),
    ],
)
def test_what_the_registry_does_not_help_with(
    registry: Path, name: str, error: type[ActstoreError], message: str
) -> None:
    with pytest.raises(error, match=message):
        expand_sae_arguments([name])


@pytest.mark.parametrize(
    "name", ["saelens:gpt2-small-res-jb/blocks.3.hook_resid_pre", "neuronpedia:gpt2-small/3-res-jb"]
)
def test_without_sae_lens_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "path", [])  # nothing is installed
    with pytest.raises(MissingDependency, match=r"pip install 'actstore\[saelens\]'.*owner/repo/path"):
        expand_sae_arguments([name])
