"""Architectures that nobody described: accepted by their identities, or refused by the name of the one that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models_support import CASES, captured, token_batch
from transformers import AutoConfig, AutoModelForCausalLM

from actstore.errors import ActstoreError, Unhealthy, UnsupportedFormat
from actstore.models import describe_model, load_model
from actstore.models.discovery import family_of_model
from actstore.models.families import FAMILIES
from actstore.sites import Site

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = {name: SIZES[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
GPT_NEO = {"hidden_size": 24, "num_layers": 3, "num_heads": 6, "attention_types": [[["global"], 3]]}
EVERYWHERE = {"resid_pre", "pattern", "z", "attn_out_raw", "attn_out", "mlp_act", "mlp_out_raw", "mlp_out"}
EVERYWHERE |= {"resid_post", "final"}
IN_SEQUENCE = EVERYWHERE | {"resid_mid", "ln2", "ln2_normalized"}


def random_model(kind: str, sizes: dict[str, Any], *, head_bias: float = 0) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if "norm" in name or "ln_" in name else 0.4)
            if name == "lm_head.bias":
                parameter.fill_(head_bias)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "sizes", "kinds"),
    [
        pytest.param("gemma", SIZES | {"head_dim": 10}, IN_SEQUENCE, id="gemma_1"),
        pytest.param("starcoder2", SIZES, IN_SEQUENCE, id="starcoder_2"),
        pytest.param("stablelm", SIZES, IN_SEQUENCE, id="stablelm"),
        pytest.param("phi3", SIZES, IN_SEQUENCE, id="phi_3"),
        pytest.param("glm", SIZES | {"head_dim": 10}, IN_SEQUENCE, id="glm"),
        pytest.param("gpt_neo", TOKENS | GPT_NEO, IN_SEQUENCE, id="gpt_neo"),
        pytest.param("olmo3", SIZES, EVERYWHERE | {"resid_mid"}, id="olmo_3_norms_behind"),
        pytest.param("phi", SIZES, IN_SEQUENCE - {"resid_mid"}, id="phi_parallel_with_one_norm"),
        pytest.param(
            "gptj",
            TOKENS | {"n_embd": 24, "n_layer": 3, "n_head": 6, "rotary_dim": 2},
            IN_SEQUENCE - {"resid_mid"},
            id="gpt_j_parallel_with_one_norm",
        ),
    ],
)
def test_an_architecture_is_accepted_by_its_identities(
    kind: str, sizes: dict[str, Any], kinds: set[str], tmp_path: Path
) -> None:
    model = random_model(kind, sizes)
    assert type(model).__name__ not in FAMILIES
    found = load_model(model)
    assert {site.kind for site in found.sites()} == kinds
    batch = token_batch((9, 4))
    with torch.no_grad():
        states = model(input_ids=batch[0], attention_mask=batch[1], output_hidden_states=True).hidden_states
    sites = captured(found, *batch, *found.sites())
    real = batch[1].bool()
    for layer in range(3):
        torch.testing.assert_close(sites[Site("resid_pre", layer)][real], states[layer][real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sites[Site("final")][real], states[-1][real], rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    description = describe_model(tmp_path)
    assert description.sites() == found.sites() and load_model(tmp_path).facts == description.facts


@pytest.mark.parametrize(
    ("kind", "sizes", "error", "message"),
    [
        pytest.param(
            "granite",
            SIZES | {"residual_multiplier": 0.5},
            Unhealthy,
            r"resid_pre \+ attn_out = resid_mid at resid_mid\.0",
            id="scaled_before_it_is_added",
        ),
        pytest.param(
            "cohere", SIZES | {"logit_scale": 0.1}, Unhealthy, "unembedding.*the model's logits", id="scaled_logits"
        ),
        pytest.param(
            "bloom",
            TOKENS | {"hidden_size": 24, "n_layer": 3, "n_head": 6},
            UnsupportedFormat,
            r"BloomForCausalLM.*0 candidates for the width of the MLP in config\.json",
            id="configuration_of_other_words",
        ),
        pytest.param(
            "opt",
            TOKENS | {"hidden_size": 24, "ffn_dim": 36, "num_hidden_layers": 3, "num_attention_heads": 6},
            UnsupportedFormat,
            "OPTForCausalLM.*0 candidates for the MLP",
            id="mlp_without_a_module",
        ),
    ],
)
def test_an_architecture_is_refused_by_what_does_not_hold(
    kind: str, sizes: dict[str, Any], error: type[ActstoreError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_model(random_model(kind, sizes))


def test_a_head_with_a_bias_is_refused() -> None:
    with pytest.raises(Unhealthy, match=r"unembedding.*the model's logits at resid_post\.2"):
        load_model(random_model("phi", SIZES, head_bias=0.5))


@pytest.mark.parametrize(
    ("path", "identity"),
    [
        pytest.param("model.layers.1.mlp", "W_down = mlp_out_raw at mlp_out_raw.1", id="mlp"),
        pytest.param("model.layers.2.self_attn.o_proj", "W_O = attn_out_raw at attn_out_raw.2", id="o_proj"),
        pytest.param("model.layers.1", "mlp_out = resid_post at resid_post.1", id="layer"),
        pytest.param("model.layers.0.post_attention_layernorm", "gain = ln2 at ln2.0", id="pre_norm"),
        pytest.param("model.norm", "the model's logits", id="final_norm"),
    ],
)
def test_a_copy_with_one_module_scaled_is_refused_naming_the_identity(path: str, identity: str) -> None:
    model = random_model("starcoder2", SIZES)
    model.get_submodule(path).register_forward_hook(_scale)
    with pytest.raises(Unhealthy, match=identity):
        load_model(model)


def _scale(_module: Any, _given: Any, output: Any) -> Any:
    return (output[0] * 1.1, *output[1:]) if isinstance(output, tuple) else output * 1.1


@pytest.mark.parametrize("name", CASES)
def test_discovery_finds_what_is_described(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with torch.device("meta"):
        config = CASES[name].config()
        model = getattr(transformers, CASES[name].architecture)._from_config(config, attn_implementation="eager").eval()
    described = load_model(CASES[name].model()).family
    monkeypatch.setattr("actstore.models.discovery.FAMILIES", {})
    found = family_of_model(model, "tiny")
    in_parallel = bool(described.parallel_key and getattr(config, described.parallel_key))
    expected = described.taps.keys() - {"embed_raw", "q", "k", "v"} - ({"resid_mid"} if in_parallel else set())
    assert found.taps == {kind: described.taps[kind] for kind in expected}
    for part in (
        "final_norm",
        "attention_output",
        "mlp_output",
        "mlp_pre_norm",
        "attention_post_norm",
        "mlp_post_norm",
    ):
        assert getattr(found, part) == getattr(described, part), part
    assert (found.norm, found.norm_gain_offset) == (described.norm, described.norm_gain_offset)
    assert (found.norm_eps_key, found.weights_are_inputs_first) == (
        described.norm_eps_key,
        described.weights_are_inputs_first,
    )
