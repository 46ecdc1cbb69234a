"""Checkpoints as they are found: broken, mislabelled, of another kind. Each is refused with the reason."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import CASES
from safetensors.torch import load_file, save_file

from actstore.errors import ActstoreError, InvalidInput, MissingDependency, UnsupportedFormat
from actstore.models import describe_model, load_model
from actstore.models.versions import OLDEST_TRANSFORMERS

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in several files."""
    CASES["llama"].model().save_pretrained(tmp_path / "tiny-llama", max_shard_size="20KB")
    assert len(list((tmp_path / "tiny-llama").glob("*.safetensors"))) > 3
    return tmp_path / "tiny-llama"


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def cut(folder: Path) -> None:
    shards(folder)[1].write_bytes(shards(folder)[1].read_bytes()[:-8])


def pointer(folder: Path) -> None:
    """What a clone without git-lfs leaves."""
    shards(folder)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(cut, "not fully covered", id="one_file_cut_short"),
        pytest.param(pointer, "header too large", id="a_pointer_instead_of_a_file"),
        pytest.param(lambda folder: shards(folder)[2].write_bytes(b""), "header too small", id="one_file_empty"),
        pytest.param(lambda folder: shards(folder)[1].unlink(), "No such file", id="one_file_gone"),
        pytest.param(
            lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "line 1", id="index_broken"
        ),
        pytest.param(
            lambda folder: (folder / "model.safetensors.index.json").unlink(), "model.safetensors", id="index_gone"
        ),
    ],
)
def test_damaged_weight_files_are_refused(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(InvalidInput, match=rf"tiny-llama cannot be read: .*{message}.*fetch the model again"):
        load_model(folder)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"])
def test_one_number_that_is_not_finite_is_refused_by_the_name_of_its_weight(
    tmp_path: Path, name: str, number: float
) -> None:
    """The last row of the embedding is a token that a proof may never draw."""
    CASES["llama"].model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights[name][-1, 5] = number
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=rf"1 weights of .* hold NaN or infinity: {name}\. Accepted: finite"):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_in_memory_with_nan_is_refused(dtype: torch.dtype) -> None:
    model = CASES["llama"].model(dtype)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(InvalidInput, match=r"hold NaN or infinity: model\.norm\.weight"):
        load_model(model)


def test_a_head_that_the_configuration_ties_and_the_files_do_not_is_refused(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    with pytest.raises(InvalidInput, match=r"ties the head.*two different tensors.*set tie_word_embeddings"):
        load_model(folder)


def test_a_head_that_the_configuration_unties_and_the_files_do_not_have_is_refused(tmp_path: Path) -> None:
    CASES["llama_with_biases_tied"].model().save_pretrained(tmp_path)
    configure(tmp_path, tie_word_embeddings=False)
    with pytest.raises(InvalidInput, match=r"1 tensors are missing \(lm_head\.weight"):
        load_model(tmp_path)


REMOTE = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param(
            {"model_type": "evil", "architectures": ["EvilForCausalLM"], "auto_map": REMOTE},
            InvalidInput,
            "EvilForCausalLM.*remote code is never run",
            id="remote_class",
        ),
        pytest.param(
            {"model_type": "evil", "auto_map": REMOTE},
            InvalidInput,
            "type 'evil', which only code in its own repository knows.*remote code is never run",
            id="remote_configuration_of_a_known_class",
        ),
        pytest.param(
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            UnsupportedFormat,
            r"quantised \(gptq\).*give the model that was quantised",
            id="quantised",
        ),
        pytest.param({"num_hidden_layers": 4}, InvalidInput, "9 tensors are missing", id="a_layer_too_few"),
        pytest.param({"vocab_size": 98}, InvalidInput, "2 tensors have another shape", id="another_vocabulary"),
        pytest.param({"model_type": "gpt2"}, InvalidInput, "tensors are missing", id="type_and_class_disagree"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], error: type[ActstoreError], message: str
) -> None:
    canary = tmp_path / "canary"
    (folder / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w').close()")
    configure(folder, **changes)
    with pytest.raises(error, match=message) as caught:
        load_model(folder)
    assert "trust_remote_code" not in str(caught.value) and not canary.exists()


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.3.0", "5.3.1.dev0"])
def test_a_transformers_that_is_too_old_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("actstore.models.versions.version", {"transformers": version}.__getitem__)
    for open_it in (load_model, describe_model):
        with pytest.raises(MissingDependency, match=rf"{version} is too old.*pip install .*'transformers>=5\.4'"):
            open_it(folder)
    with pytest.raises(MissingDependency, match="too old"):
        load_model(CASES["llama"].model())


@pytest.mark.parametrize("version", ["5.4.0", "5.10.1", "5.30.0.dev0", "6.0.0rc1"])
def test_newer_releases_are_accepted(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("actstore.models.versions.version", {"transformers": version}.__getitem__)
    assert describe_model(folder).facts.n_layers == 3


def test_the_oldest_release_is_the_one_that_is_installed_at_least() -> None:
    required = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    assert f"transformers>={OLDEST_TRANSFORMERS}" in required
