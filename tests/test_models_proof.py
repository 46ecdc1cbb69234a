"""A sound model passes its proofs; a model or description that is wrong anywhere is refused by name (DESIGN §8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models_support import tiny_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from actstore.errors import InvalidInput, Unhealthy, UnknownName
from actstore.health import HealthCheck
from actstore.models import LoadedModel, load_model, prove
from actstore.models.families import GEMMA_2
from actstore.sites import Site, parse_site


@pytest.fixture
def model() -> LoadedModel:
    return load_model(tiny_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_sound_model_passes(dtype: torch.dtype, tied: bool) -> None:
    model = load_model(tiny_model(dtype=dtype, tie_word_embeddings=tied))
    checks = prove(model, model.sites())
    assert all(check.ok for check in checks)
    assert {check.subject for check in checks if check.name == "width"} == {str(site) for site in model.sites()}


def test_only_the_layers_that_were_asked_for_are_proved(model: LoadedModel) -> None:
    checks = prove(model, [Site("z", 1)])
    assert {check.name: check.subject for check in checks} == {
        "width": "z.1",
        "resid_pre + attn_out = resid_mid": "resid_mid.1",
        "resid_pre + attn_out + mlp_out = resid_post": "resid_post.1",
        "z · W_O = attn_out_raw": "attn_out_raw.1",
        "mlp_act · W_down = mlp_out_raw": "mlp_out_raw.1",
        "post-norm(attn_out_raw) = attn_out": "attn_out.1",
        "ln2_normalized · gain = ln2": "ln2.1",
        "post-norm(mlp_out_raw) = mlp_out": "mlp_out.1",
        "scale · embed_raw + position = resid_pre": "resid_pre.0",
        "unembedding(resid_post) = the model's logits": "resid_post.2",
        "the start of a sequence = its rows in the whole": "resid_post.2",
        "a padded batch = single runs": "z.1",
    }


def _scaled(path: str) -> Callable[[torch.nn.Module], None]:
    """Return a change after which a module returns 1.1 times what it computes from its inputs."""

    def tamper(model: torch.nn.Module) -> None:
        def scale(_module: Any, _inputs: Any, output: Any) -> Any:
            return (output[0] * 1.1, *output[1:]) if isinstance(output, tuple) else output * 1.1

        model.get_submodule(path).register_forward_hook(scale)

    return tamper


def _row_dependent(model: torch.nn.Module) -> None:
    def mix(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + output.mean(dim=(0, 1), keepdim=True)

    model.get_submodule("model.layers.0.mlp.down_proj").register_forward_hook(mix)


@pytest.mark.parametrize(
    ("tamper", "identity"),
    [
        pytest.param(
            _scaled("model.layers.1"), r"resid_pre \+ attn_out \+ mlp_out = resid_post at resid_post.1", id="layer"
        ),
        pytest.param(_scaled("model.layers.1.self_attn.o_proj"), "W_O = attn_out_raw at attn_out_raw.1", id="o_proj"),
        pytest.param(_scaled("model.layers.1.self_attn"), "W_O = attn_out_raw at attn_out_raw.1", id="attention"),
        pytest.param(_scaled("model.layers.1.post_attention_layernorm"), "= attn_out at attn_out.1", id="post_norm"),
        pytest.param(_scaled("model.layers.1.mlp.down_proj"), "W_down = mlp_out_raw at mlp_out_raw.1", id="down_proj"),
        pytest.param(_scaled("model.layers.1.pre_feedforward_layernorm"), "gain = ln2 at ln2.1", id="pre_norm"),
        pytest.param(_scaled("model.layers.1.post_feedforward_layernorm"), "= mlp_out at mlp_out.1", id="mlp_post"),
        pytest.param(_scaled("model.embed_tokens"), r"\+ position = resid_pre at resid_pre.0", id="embedding"),
        pytest.param(_scaled("lm_head"), "the model's logits at resid_post.2", id="unembedding"),
        pytest.param(_scaled("model.norm"), "the model's logits at resid_post.2", id="final_norm"),
        pytest.param(_row_dependent, "a padded batch = single runs at resid_post.1", id="rows_that_mix"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tampered_model_is_refused_by_the_name_of_the_identity(
    tamper: Callable[[torch.nn.Module], None], identity: str, dtype: torch.dtype
) -> None:
    model = load_model(tiny_model(dtype=dtype))
    tamper(model.causal_lm)
    with pytest.raises(Unhealthy, match=rf"{identity} is [\d.e+-]+, at most \d"):
        prove(model, [Site("embed_raw"), Site("resid_post", 1)])


def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
        use_bidirectional_attention=True,
    )
    model = Gemma3ForCausalLM._from_config(config, attn_implementation="eager")
    with pytest.raises(Unhealthy, match=r"the start of a sequence = its rows in the whole at resid_post\.1"):
        prove(load_model(model), [Site("resid_post", 0)])


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        pytest.param("mlp_out", "mlp_out_raw", id="before_the_post_norm"),
        pytest.param("ln2", "ln2_normalized", id="without_its_gain"),
        pytest.param("ln2_normalized", "ln2", id="with_its_gain"),
        pytest.param("mlp_out_raw", "mlp_out", id="after_the_post_norm"),
        pytest.param("attn_out", "attn_out_raw", id="attention_before_the_post_norm"),
        pytest.param("resid_post", "final", id="hidden_states_after_the_final_norm"),
        pytest.param("resid_mid", "ln2", id="after_the_pre_norm"),
        pytest.param("z", "q", id="queries_for_heads"),
    ],
)
def test_a_wrong_description_of_an_architecture_is_refused(model: LoadedModel, kind: str, wrong: str) -> None:
    family = replace(GEMMA_2, taps={**GEMMA_2.taps, kind: GEMMA_2.taps[wrong]})
    with pytest.raises(Unhealthy):
        prove(replace(model, family=family), [Site(kind, 2)])


def test_a_wrong_place_for_the_final_norm_is_refused(model: LoadedModel) -> None:
    family = replace(GEMMA_2, taps={**GEMMA_2.taps, "final": replace(GEMMA_2.taps["final"], end="input")})
    with pytest.raises(Unhealthy, match=r"final-norm\(resid_post\) = final at final is"):
        prove(replace(model, family=family), [Site("final")])


def test_a_declared_width_that_is_wrong_is_refused(model: LoadedModel) -> None:
    tap = replace(GEMMA_2.taps["mlp_act"], width="d_model")
    wrong = replace(model, family=replace(GEMMA_2, taps={**GEMMA_2.taps, "mlp_act": tap}))
    with pytest.raises(Unhealthy, match=r"width at mlp_act\.0 is 36, 24"):
        prove(wrong, [Site("mlp_act", 0)])


def test_numbers_that_are_not_finite_are_refused(model: LoadedModel) -> None:
    with torch.no_grad():
        model.causal_lm.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(Unhealthy, match="not finite"):
        prove(model, [Site("resid_post", 0)])


@pytest.mark.parametrize(
    "ids", [pytest.param([], id="none"), pytest.param([3, 97], id="beyond"), pytest.param([-1], id="negative")]
)
def test_vocabulary_ids_must_be_the_models(model: LoadedModel, ids: list[int]) -> None:
    with pytest.raises(InvalidInput, match="0 to 96"):
        prove(model, [Site("z", 0)], vocabulary_ids=ids)


def test_only_the_given_vocabulary_is_run(model: LoadedModel) -> None:
    seen: set[int] = set()
    model.causal_lm.model.embed_tokens.register_forward_pre_hook(
        lambda _m, inputs: seen.update(inputs[0].flatten().tolist())
    )
    prove(model, [Site("z", 0)], vocabulary_ids=[7, 8, 9])
    assert seen <= {7, 8, 9}


def test_a_site_that_is_not_there_cannot_be_proved(model: LoadedModel) -> None:
    with pytest.raises(UnknownName):
        prove(model, [parse_site("pattern.3")])


def test_checks_survive_json() -> None:
    check = HealthCheck("sae_fvu", "3-demo", 0.25, "below 1", None)
    assert HealthCheck.from_json(check.to_json()) == check
    assert HealthCheck("sae_fvu", "3-demo", float("nan"), "below 1", False).value is None
