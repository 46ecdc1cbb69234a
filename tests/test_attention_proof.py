"""Patterns, queries, keys and values are proved from each other; taps that find something else are refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models_support import CASES, N_LAYERS, captured, token_batch
from transformers import AutoConfig, AutoModelForCausalLM

from actstore.errors import Unhealthy
from actstore.models import LoadedModel, load_model, prove
from actstore.models.attention import PATTERN_TOLERANCE
from actstore.models.discovery import family_of_model
from actstore.models.proof import IDENTITY_TOLERANCE
from actstore.sites import Site

SUMS, MIXED, REMADE = "pattern sums to 1 over allowed keys", "pattern · v = z", "softmax(q · k) = pattern"
ATTENTION = {SUMS, MIXED, REMADE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_sound_model_passes(name: str, dtype: torch.dtype) -> None:
    model = load_model(CASES[name].model(dtype))
    asked = [Site(kind, layer) for layer in range(N_LAYERS) for kind in ("pattern", "q", "k", "v")]
    checks = [check for check in prove(model, asked) if check.name in ATTENTION]
    assert {(check.name, check.subject) for check in checks} == {
        *((name, f"pattern.{layer}") for name in (SUMS, REMADE) for layer in range(N_LAYERS)),
        *((MIXED, f"z.{layer}") for layer in range(N_LAYERS)),
    }
    for check in checks:
        tolerances = PATTERN_TOLERANCE if check.name == REMADE else IDENTITY_TOLERANCE
        assert check.value is not None and check.value < tolerances[model.dtype] / 3


@pytest.mark.parametrize("name", CASES)
def test_a_pattern_is_what_transformers_returns(name: str) -> None:
    model, batch = load_model(CASES[name].model()), token_batch((11, 6, 1))
    sites = [Site("pattern", layer) for layer in range(N_LAYERS)]
    with torch.no_grad():
        asked = {"input_ids": batch[0], "attention_mask": batch[1], "output_attentions": True}
        attentions = model.causal_lm(**asked, use_cache=False).attentions
    for site, values in captured(model, *batch, *sites).items():
        assert values.shape == (3, model.site_width(site), 11, 11)
        assert torch.equal(values, attentions[site.layer or 0])


@pytest.mark.parametrize("kind", ["pattern", "q", "k", "v"])
def test_each_kind_is_proved_in_its_layer_alone(kind: str) -> None:
    checks = prove(load_model(CASES["gemma_2"].model()), [Site(kind, 1)])
    assert {(check.name, check.subject) for check in checks if check.name in ATTENTION} == {
        (SUMS, "pattern.1"),
        (REMADE, "pattern.1"),
        (MIXED, "z.1"),
    }


def test_other_kinds_need_no_attention() -> None:
    checks = prove(load_model(CASES["gemma_2"].model()), [Site("z", 1)])
    assert not ATTENTION & {check.name for check in checks}


def with_taps(model: LoadedModel, **taps: Any) -> LoadedModel:
    return replace(model, family=replace(model.family, taps={**model.family.taps, **taps}))


@pytest.mark.parametrize("name", ["gpt_2", "pythia"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_for_keys_are_refused(name: str, dtype: torch.dtype) -> None:
    model = load_model(CASES[name].model(dtype))
    taps = model.family.taps
    # Scores are transposed then: a causal softmax of them is another pattern.
    with pytest.raises(Unhealthy, match=r"softmax\(q · k\) = pattern at pattern\.1"):
        prove(with_taps(model, q=taps["k"], k=taps["q"]), [Site("q", 1)])


@pytest.mark.parametrize(("name", "other"), [("gpt_2", "_of_each_head"), ("pythia", "")], ids=["gpt_2", "pythia"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_of_another_head_order_are_refused(name: str, other: str, dtype: torch.dtype) -> None:
    model = load_model(CASES[name].model(dtype))
    transform: Any = f"last_third{other}"
    with pytest.raises(Unhealthy, match=r"pattern · v = z at z\.2"):
        prove(with_taps(model, v=replace(model.family.taps["v"], transform=transform)), [Site("v", 2)])


def test_keys_before_their_norm_are_refused() -> None:
    model = load_model(CASES["qwen_3"].model())
    before = replace(model.family.taps["k"], module="model.layers.{layer}.self_attn.k_proj", transform=None)
    with pytest.raises(Unhealthy, match=r"softmax\(q · k\) = pattern at pattern\.0"):
        prove(with_taps(model, k=before), [Site("k", 0)])


def test_query_heads_that_read_the_wrong_group_are_refused() -> None:
    model = load_model(CASES["llama"].model())

    def swap(_module: Any, _given: Any, output: torch.Tensor) -> torch.Tensor:
        return output.roll(10, dims=-1)

    model.causal_lm.model.layers[1].self_attn.v_proj.register_forward_hook(swap)
    prove(model, [Site("resid_post", 1)])  # it is another model, and a sound one
    assert torch.isfinite(captured(model, *token_batch((5,)), Site("v", 1))[Site("v", 1)]).all()
    prove(model, [Site("v", 1)])
    shifted = replace(model.family.taps["v"], module="model.layers.{layer}.self_attn.k_proj")
    with pytest.raises(Unhealthy, match=r"pattern · v = z at z\.1"):
        prove(with_taps(model, v=shifted), [Site("v", 1)])


@pytest.mark.parametrize(
    ("change", "identity"),
    [
        pytest.param(lambda p: p * 1.1, r"sums to 1 over allowed keys at pattern\.1", id="scaled"),
        pytest.param(lambda p: p.flip(-1), r"sums to 1 over allowed keys at pattern\.1", id="later_keys"),
        pytest.param(lambda p: p.flip(1), r"pattern · v = z at z\.1", id="heads_reversed"),
    ],
)
def test_weights_that_are_not_the_pattern_are_refused(change: Any, identity: str) -> None:
    model = load_model(CASES["gemma_2"].model())
    attention = model.causal_lm.model.layers[1].self_attn
    attention.register_forward_hook(lambda _m, _i, output: (output[0], change(output[1])))
    with pytest.raises(Unhealthy, match=identity):
        prove(model, [Site("pattern", 1)])


def test_a_window_that_is_not_the_layers_is_refused() -> None:
    model = load_model(CASES["gemma_2"].model())
    model.causal_lm.model.layers[0].self_attn.sliding_window = 3  # the mask allows 4
    with pytest.raises(Unhealthy, match=r"sums to 1 over allowed keys at pattern\.0"):
        prove(model, [Site("pattern", 0)])


def starcoder() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "pad_token_id": 0, "bos_token_id": 1}
    config = AutoConfig.for_model("starcoder2", **sizes, **heads, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_a_discovered_pattern_is_proved_by_its_sums() -> None:
    model = load_model(starcoder())
    assert model.family.discovered and "q" not in model.family.taps
    checks = prove(model, [Site("pattern", 0), Site("pattern", 1)])
    assert [check.subject for check in checks if check.name in ATTENTION] == ["pattern.0", "pattern.1"]


def test_sinks_that_take_weight_refuse_the_pattern_and_nothing_else() -> None:
    causal_lm = starcoder()
    for layer in causal_lm.model.layers:
        layer.self_attn.register_forward_hook(lambda _m, _i, output: (output[0], output[1] * 0.9))
    model = load_model(causal_lm)
    prove(model, [Site("z", 0)])
    with pytest.raises(Unhealthy, match=r"sums to 1 over allowed keys at pattern\.0 is 0\.1"):
        prove(model, [Site("pattern", 0)])


def test_attention_that_returns_no_weights_has_no_pattern() -> None:
    causal_lm = starcoder()
    causal_lm.set_attn_implementation("sdpa")
    assert "pattern" not in family_of_model(causal_lm, "tiny").taps


def test_a_discovered_model_in_memory_is_made_eager_before_its_pattern_is_looked_for() -> None:
    causal_lm = starcoder()
    causal_lm.set_attn_implementation("sdpa")
    assert Site("pattern", 1) in load_model(causal_lm).sites()
