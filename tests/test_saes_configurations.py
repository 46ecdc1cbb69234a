"""A format is known by its files; a configuration is believed word by word, and refused for every word it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from saes_support import (
    SAELENS,
    plain_tensors,
    write_gemma_scope_2,
    write_llama_scope,
    write_saelens,
    write_sparsify,
)

from actstore.errors import InvalidInput, UnsupportedFormat
from actstore.saes import expand_sae_arguments, load_sae
from actstore.saes.hooks import sites_of_hooks
from actstore.sites import parse_site


def _site(folder: Path, site: str = "") -> str:
    return str(expand_sae_arguments([f"{folder}{site}"])[0].site)


def _metadata(**changes: Any) -> dict[str, Any]:
    return {"metadata": {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_pre"} | changes}


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.5.attn.hook_z", "z.5"),
        ("blocks.5.hook_mlp_out", "mlp_out.5"),
        ("resid_mid.5", "resid_mid.5"),
        ("layers.5", "resid_post.5"),
        ("h.3", "resid_post.3"),
        ("h.3.mlp", "mlp_out_raw.3"),
        ("layers.5.attention", "attn_out_raw.5"),
        ("layers.5.self_attn", "attn_out_raw.5"),
        ("gpt_neox.layers.5.input", "resid_pre.5"),
        ("model.layers.5.output", "resid_post.5"),
        ("model.language_model.layers.5.self_attn.o_proj.input", "z.5"),
        ("transformer.h.0.attn.c_proj.input", "z.0"),
        ("model.layers.5.post_feedforward_layernorm.output", "mlp_out.5"),
        ("model.layers.5.pre_feedforward_layernorm.output", "ln2.5"),
        ("model.layers.5.mlp.down_proj.input", "mlp_act.5"),
    ],
)
def test_a_hook_is_a_site(hook: str, site: str) -> None:
    assert sites_of_hooks(hook) == (parse_site(site),)


@pytest.mark.parametrize(
    "hook",
    ["", "layers", "layers.x", "model.layers.5.post_attention_layernorm.output", "blocks.5.hook_unheard", "a.h.3", "5"],
)
def test_a_hook_that_is_not_one_tensor_is_none(hook: str) -> None:
    assert sites_of_hooks(hook) == ()


@pytest.mark.parametrize(
    ("metadata", "argument", "site"),
    [
        pytest.param({}, "", "resid_pre.3", id="hook_name"),
        pytest.param({}, "@blocks.3.hook_resid_pre", "resid_pre.3", id="said_twice"),
        pytest.param({"hf_hook_name": "transformer.h.3.input"}, "", "resid_pre.3", id="two_names_of_one"),
        pytest.param({"hook_name": None, "hf_hook_name": "model.layers.3.output"}, "", "resid_post.3", id="hf_alone"),
        pytest.param(
            {"hook_name": "blocks.3.hook_mlp_out", "hf_hook_name": "model.layers.3.mlp"},
            "@mlp_out.3",
            "mlp_out.3",
            id="one_of_two_chosen",
        ),
        pytest.param({"hook_name": "blocks.3.hook_unheard"}, "@ln2.3", "ln2.3", id="unknown_hook_and_site"),
    ],
)
def test_the_configuration_says_the_site(tmp_path: Path, metadata: dict[str, Any], argument: str, site: str) -> None:
    assert _site(write_saelens(tmp_path, plain_tensors(), **_metadata(**metadata)), argument) == site


def test_a_site_that_is_asked_for_wins_over_the_configuration_and_is_told(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, plain_tensors())
    (found,) = expand_sae_arguments([f"{folder}@resid_post.3"])
    assert (str(found.site), load_sae(found).identity.site) == ("resid_post.3", "resid_post.3")
    assert found.overruled == "site resid_post.3 as asked; its path or cfg.json says resid_pre.3"
    assert [one.overruled for one in expand_sae_arguments([f"{folder}@resid_pre.3", f"a={folder}"])] == [None, None]


def test_a_configuration_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, plain_tensors())
    write_saelens(tmp_path, plain_tensors(), **_metadata(hf_hook_name="model.layers.3.output"))
    with pytest.raises(InvalidInput, match=r"resid_pre\.3 and resid_post\.3.*Next: say which: .*@resid_pre\.3"):
        _site(folder)
    write_saelens(tmp_path, plain_tensors(), **_metadata(hook_name="blocks.3.hook_unheard"))
    with pytest.raises(InvalidInput, match="Nothing says which site"):
        _site(folder)


def test_a_folder_says_the_site(tmp_path: Path) -> None:
    assert _site(write_sparsify(tmp_path, "layers.7.mlp")[0]) == "mlp_out_raw.7"
    with pytest.raises(InvalidInput, match="Nothing says which site"):
        _site(write_sparsify(tmp_path, "my_sae")[0])
    for kind, site in {"R": "resid_post.4", "A": "attn_out.4", "M": "mlp_out.4"}.items():
        folder, _ = write_llama_scope(
            tmp_path, f"Llama3_1-8B-Base-L4{kind}-8x", hook_point_in=None, hook_point_out=None
        )
        assert _site(folder) == site


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"architecture": "matching_pursuit"}, 'architecture is "matching_pursuit"', id="architecture"),
        pytest.param({"architecture": "temporal_transcoder"}, "temporal_transcoder", id="transcoder"),
        pytest.param({"architecture": "batchtopk"}, 'architecture is "batchtopk"', id="training_checkpoint"),
        pytest.param({"architecture": 7}, "architecture is 7", id="architecture_number"),
        pytest.param({"normalize_activations": "expected_average_only_in"}, "from_pretrained", id="unknown_scale"),
        pytest.param({"normalize_activations": True}, "from_pretrained", id="unknown_scale_as_true"),
        pytest.param({"normalize_activations": "whitening"}, 'normalize_activations is "whitening"', id="whitening"),
        pytest.param({"normalize_activations": ["none"]}, "normalize_activations is", id="normalisation_list"),
        pytest.param({"reshape_activations": "hook_q"}, 'reshape_activations is "hook_q"', id="reshape"),
        pytest.param({"use_error_term": True}, "use_error_term is not known", id="unknown_key"),
        pytest.param({"apply_b_dec_to_input": "yes"}, 'apply_b_dec_to_input is "yes", not true', id="flag"),
        pytest.param({"architecture": "topk"}, "k is missing", id="no_k"),
        pytest.param({"architecture": "topk", "k": 0}, "k is 0, not a positive", id="k_zero"),
        pytest.param({"architecture": "topk", "k": True}, "k is true, not a positive", id="k_true"),
        pytest.param({"d_in": 10**400}, "d_in is 1000", id="huge"),
        pytest.param(_metadata(hook_head_index=2), "hook_head_index is 2", id="one_head"),
        pytest.param(
            _metadata(model_name="bloom-560m", model_from_pretrained_kwargs={"center_writing_weights": True}),
            "center_writing_weights is true with model_name 'bloom-560m'",
            id="centred_or_not",
        ),
        pytest.param(
            _metadata(hook_name="blocks.3.attn.hook_z", model_from_pretrained_kwargs={"fold_value_biases": True}),
            "fold_value_biases is true",
            id="value_biases",
        ),
        pytest.param(
            {"metadata": None, "hook_point": "blocks.3.hook_resid_pre", "model_name": "gpt2-small"},
            "model_from_pretrained_kwargs is missing.*saelens:release/sae_id",
            id="the_oldest_folders",
        ),
        pytest.param({f"key_{number}": 1 for number in range(5000)}, "key_9 is not known.*4,990 more", id="many_keys"),
        pytest.param({"normalize_activations": "centred"}, 'normalize_activations is "centred"', id="our_own_word"),
        pytest.param({"metadata": "none"}, 'metadata is "none", not an object', id="metadata"),
        pytest.param(
            {"metadata": None, "activation_fn_str": "tanh-relu"},
            'activation_fn_str is "tanh-relu"',
            id="old_activation",
        ),
        pytest.param({"metadata": None, "finetuning_scaling_factor": True}, "finetuning_scaling_factor", id="scaled"),
    ],
)
def test_a_saelens_configuration_that_is_not_read(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedFormat, match=message):
        _site(write_saelens(tmp_path, plain_tensors(), **changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [("activation", "groupmax"), ("transcode", 1), ("skip_connection", "yes"), ("k", None), ("new_key", 1)],
)
def test_a_sparsify_configuration_that_is_not_read(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(UnsupportedFormat, match=f"{name} is"):
        _site(write_sparsify(tmp_path, **{name: value})[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("type", "crosscoder"),
        ("affine_connection", True),
        ("affine_connection", 0),
        ("architecture", "topk"),
        ("hf_hook_point_out", "model.layers.13.post_feedforward_layernorm.output"),
        ("width", "16k"),
    ],
)
def test_a_gemma_scope_2_configuration_that_is_not_read(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(UnsupportedFormat, match=f"{name} is"):
        _site(write_gemma_scope_2(tmp_path, **{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("act_fn", "relu"),
        ("norm_activation", "token-wise"),
        ("sparsity_include_decoder_norm", False),
        ("apply_decoder_bias_to_pre_encoder", True),
        ("hook_point_out", "blocks.15.hook_mlp_out"),
        ("jump_relu_threshold", None),
        ("dataset_average_activation_norm", {"in": 8.5}),
        ("dataset_average_activation_norm", {"in": 8.5, "out": float("nan")}),
        ("jump_relu_threshold", -1.0),
    ],
)
def test_a_llama_scope_configuration_that_is_not_read(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(UnsupportedFormat, match=r"hyperparams\.json describes it: .* is"):
        _site(write_llama_scope(tmp_path, **{name: value})[0])


def test_all_faults_of_a_configuration_are_in_one_message(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, plain_tensors(), architecture="gatedx", d_in="ten", noise=1)
    with pytest.raises(UnsupportedFormat, match=r'noise is not known.*gatedx.*d_in is "ten"'):
        _site(folder)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"d_in": ' + "[" * 100_000, '{"d_in": ' + "1" * 5000 + "}", "\xff", " " * (1 << 23)],
    ids=["empty", "list", "cut", "deep", "long_number", "no_utf8", "large"],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: str) -> None:
    folder = write_saelens(tmp_path, plain_tensors())
    (folder / "cfg.json").write_text(content, encoding="latin-1")
    with pytest.raises(InvalidInput, match=r"cfg\.json is not a configuration"):
        _site(folder)


def test_the_configuration_must_fit_the_weights(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, plain_tensors(), d_in=12, d_sae=64)
    with pytest.raises(InvalidInput, match=r"48 features, and 64 by its cfg\.json; it reads 10 numbers, and 12 by"):
        load_sae(expand_sae_arguments([str(folder)])[0])


def test_the_written_configuration_is_the_published_one(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, plain_tensors())
    assert json.loads((folder / "cfg.json").read_text()) == SAELENS
