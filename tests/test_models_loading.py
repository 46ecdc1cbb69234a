"""What is loaded, how it is called, and what is refused before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from models_support import captured, reference_sites, save_tiny_model, tiny_model, token_batch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BertConfig, LlamaConfig, OPTConfig, T5Config

from actstore.errors import ActstoreError, InvalidInput, MissingInput, UnsupportedFormat
from actstore.models import describe_model, load_model
from actstore.sites import Site


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-gemma")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "copy")


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_importing_the_room_is_light() -> None:
    program = "import sys, actstore.models; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_description_needs_no_weights(folder: Path, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    facts = describe_model(copy).facts
    assert (facts.name, facts.architecture, facts.checkpoint_dtype) == ("copy", "Gemma2ForCausalLM", "float32")
    assert (facts.n_layers, facts.d_model, facts.query_width, facts.kv_width, facts.d_mlp) == (3, 24, 60, 30, 36)
    assert (facts.vocabulary_size, facts.final_softcap, facts.norm_eps) == (97, 30.0, 1e-6)
    assert facts.n_parameters == sum(parameter.numel() for parameter in tiny_model().parameters())
    assert describe_model(copy).config_digest == describe_model(folder).config_digest


def test_a_description_has_the_sites_of_the_loaded_model(folder: Path) -> None:
    description, model = describe_model(folder), load_model(folder)
    assert description.sites() == model.sites() and description.facts == model.facts
    assert [description.site_width(site) for site in model.sites()] == [
        model.site_width(site) for site in model.sites()
    ]


def test_a_model_from_a_folder_computes_what_the_saved_one_did(folder: Path) -> None:
    batch, site = token_batch((9, 4)), Site("resid_post", 1)
    found = captured(load_model(folder), *batch, site)[site]
    assert torch.equal(found, reference_sites(tiny_model(), *batch)["resid_post.1"])


def test_identity_names_the_model_and_never_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = load_model(folder).identity
    monkeypatch.chdir(folder)
    assert load_model(".").identity == identity
    assert (identity.name, identity.revision, identity.architecture) == ("tiny-gemma", None, "Gemma2ForCausalLM")


def test_the_weights_digest_follows_the_bytes(folder: Path, copy: Path) -> None:
    same = load_model(folder).identity.weights_digest
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert load_model(folder).identity.weights_digest == same != load_model(copy).identity.weights_digest


def test_weights_in_several_files_are_read_and_digested(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = load_model(tmp_path)
    assert torch.equal(model.causal_lm.model.norm.weight, tiny_model().model.norm.weight)


def test_a_model_in_memory_is_switched_to_eager_evaluation() -> None:
    model = tiny_model().train()
    model.config._attn_implementation_internal = "flex_attention"
    loaded = load_model(model)
    assert loaded.causal_lm is model and not model.training
    assert model.config._attn_implementation == "eager"
    assert loaded.identity.name == "in-memory"


def test_a_model_in_memory_is_digested_by_its_tensors(folder: Path) -> None:
    first, again, other = (load_model(tiny_model(seed)).identity for seed in (0, 0, 1))
    assert first == again and first.weights_digest != other.weights_digest
    from_folder = load_model(folder)
    assert from_folder.identity.config_digest == first.config_digest
    named = load_model(from_folder.causal_lm).identity
    assert named.name == "tiny-gemma" and named.weights_digest == first.weights_digest


def test_the_checkpoint_decides_the_dtype_unless_asked(tmp_path: Path) -> None:
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == "bfloat16"
    assert load_model(tmp_path, dtype="float32").dtype == "float32"


def test_a_float16_checkpoint_is_widened_only_where_asked(tmp_path: Path) -> None:
    tiny_model(dtype=torch.float16).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match=r"float16.*65,504.*bfloat16"):
        load_model(tmp_path)
    assert load_model(tmp_path, dtype="float32").dtype == "float32"


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "half"])
def test_other_compute_dtypes_are_refused(folder: Path, dtype: str) -> None:
    with pytest.raises(InvalidInput, match=rf"{dtype}.*float32 or bfloat16"):
        load_model(folder, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_an_unknown_or_absent_device_is_refused(folder: Path, device: str) -> None:
    with pytest.raises(InvalidInput, match=r"device.*'cpu'"):
        load_model(folder, device=device)


def test_loading_switches_tf32_off(folder: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    load_model(folder)
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("model", "keywords", "message"),
    [
        pytest.param(lambda: tiny_model(dtype=torch.float16), {}, "float16", id="float16"),
        pytest.param(tiny_model, {"dtype": "bfloat16"}, "float32.*bfloat16", id="other_dtype"),
        pytest.param(tiny_model, {"device": "cuda"}, "cpu.*cuda", id="other_device"),
        pytest.param(lambda: tiny_model().to("meta"), {}, "meta", id="no_weights"),
        pytest.param(lambda: torch.nn.Linear(2, 2), {}, "Linear.*PreTrainedModel", id="no_language_model"),
    ],
)
def test_a_model_in_memory_is_never_cast_or_moved(model: Any, keywords: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_model(model(), **keywords)


def test_a_model_in_memory_without_a_head_is_refused() -> None:
    with pytest.raises(UnsupportedFormat, match=r"Gemma2Model.*Gemma2ForCausalLM"):
        load_model(tiny_model().model)


def _write_config(folder: Path, config: Any, *architectures: str) -> Path:
    config.architectures = list(architectures)
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "architecture", "error", "message"),
    [
        pytest.param(BertConfig(), "BertModel", InvalidInput, "every token sees those behind it", id="encoder"),
        pytest.param(BertConfig(), "BertForMaskedLM", InvalidInput, "encoder every token sees", id="masked"),
        pytest.param(T5Config(), "T5ForConditionalGeneration", InvalidInput, "two residual", id="encoder_decoder"),
        pytest.param(BartConfig(), "BartForConditionalGeneration", InvalidInput, "two residual streams", id="bart"),
        pytest.param(LlamaConfig(), "LlamaModel", InvalidInput, "head that predicts tokens is missing", id="no_head"),
        pytest.param(OPTConfig(), "OPTForCausalLM", UnsupportedFormat, "Accepted: Gemma2ForCausalLM", id="family"),
        pytest.param(LlamaConfig(), "MyOwnModel", InvalidInput, "remote code is never run", id="remote_code"),
    ],
)
def test_other_models_are_refused_with_the_reason(
    tmp_path: Path, config: Any, architecture: str, error: type[ActstoreError], message: str
) -> None:
    _write_config(tmp_path, config, architecture)
    with pytest.raises(error, match=message):
        describe_model(tmp_path)


def test_remote_code_named_by_a_config_is_not_run(copy: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (copy / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w').close()")
    _edit_config(copy, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    load_model(copy)
    assert not canary.exists()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="cut"),
        pytest.param("[1]", id="no_object"),
        pytest.param("{}", id="no_architecture"),
        pytest.param('{"architectures": ["Gemma2ForCausalLM"], "rms_norm_eps": NaN}', id="nan"),
        pytest.param('{"architectures": ["Gemma2ForCausalLM"]}', id="no_model_type"),
        pytest.param('{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": -4}', id="size"),
        pytest.param('{"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": "x"}', id="type"),
        pytest.param(b"\xff\xfe{}", id="bytes"),
    ],
)
def test_a_broken_configuration_is_refused(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidInput, match=r"config\.json|configuration"):
        describe_model(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("no/such/folder", "no folder no/such/folder", id="relative"),
        pytest.param("/no/folder", "no folder /no/folder", id="absolute"),
        pytest.param("~/no-such-model", "no folder ~/no-such-model", id="home"),
    ],
)
def test_a_folder_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises(MissingInput, match=message):
        describe_model(source)


def test_a_folder_without_configuration_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"no config\.json"):
        describe_model(tmp_path)
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(InvalidInput, match="is a file"):
        describe_model(file)


def test_a_folder_has_no_revisions(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="no revision 'main'"):
        load_model(folder, revision="main")


def test_weights_that_are_missing_or_pickled(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match="no weights"):
        load_model(copy)
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(UnsupportedFormat, match=r"pytorch_model\.bin.*run code.*safetensors"):
        load_model(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda weights: weights.pop("model.norm.weight"), r"1 tensors are missing \(model.norm", id="missing"
        ),
        pytest.param(
            lambda weights: weights.update({"model.layers.3.mlp.up_proj.weight": torch.ones(36, 24)}),
            "1 tensors have no place",
            id="one_layer_too_many",
        ),
        pytest.param(lambda weights: weights.update({"model.norm.weight": torch.ones(5)}), "norm.weight", id="shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copy: Path, change: Any, message: str) -> None:
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidInput, match=message):
        load_model(copy)


def test_weights_cut_short_are_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match=r"cannot be read.*fetch the model again"):
        load_model(copy)


def _hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("the hub's own words",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(hub_errors.GatedRepoError, "gated.*accept its terms", id="gated"),
        pytest.param(hub_errors.RepositoryNotFoundError, "neither a local path nor a hub repository", id="not_there"),
        pytest.param(hub_errors.RevisionNotFoundError, "no revision 'v9'", id="revision"),
        pytest.param(hub_errors.OfflineModeIsEnabled, "could not be asked.*hf download", id="offline"),
        pytest.param(hub_errors.LocalEntryNotFoundError, "could not be asked.*hf download", id="not_cached"),
        pytest.param(ConnectionError, "could not be asked.*hf download", id="no_connection"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    def refuse(*_args: object, **_keywords: object) -> None:
        raise _hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(MissingInput, match=message):
        load_model("owner/model", revision="v9")


def test_a_name_that_no_hub_model_can_have_is_one_message() -> None:
    with pytest.raises(MissingInput, match=r"owner--x/model has no model: .*Accepted: owner/name"):
        describe_model("owner--x/model")


def test_a_hub_model_is_loaded_from_the_cache_under_its_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--tiny"
    save_tiny_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    identity = load_model("owner/tiny").identity
    assert (identity.name, identity.revision) == ("owner/tiny", commit)


def test_a_local_folder_wins_over_a_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "owner" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert describe_model("owner/tiny").facts.name == "tiny"


def test_the_unembedding_shares_the_models_weights(folder: Path) -> None:
    model = load_model(folder)
    unembedding = model.unembedding()
    assert unembedding.weight.data_ptr() == model.causal_lm.lm_head.weight.data_ptr()
    expected = 1 + model.causal_lm.model.norm.weight.detach().numpy()
    np.testing.assert_array_equal(unembedding.gain.numpy(), expected.astype(np.float32))
