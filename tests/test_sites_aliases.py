"""TransformerLens' names, by a table of what they are in transformers' modules: each is the tensor of its site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_support import CASES, captured, token_batch

from actstore.models import load_model
from actstore.sites import parse_site

LAYER = 1

# The hook below `blocks.L.` → the end of a module below the layer. The residual stream and what is added to it:
GEMMA = {
    "hook_resid_pre": "input",
    "hook_in": "input",
    "hook_attn_out": "post_attention_layernorm.output",
    "hook_resid_mid": "pre_feedforward_layernorm.input",
    "hook_mlp_in": "pre_feedforward_layernorm.input",
    "mlp.hook_in": "pre_feedforward_layernorm.output",
    "mlp.hook_post": "mlp.down_proj.input",
    "mlp.out.hook_in": "mlp.down_proj.input",
    "hook_mlp_out": "post_feedforward_layernorm.output",
    "hook_resid_post": "output",
    "hook_out": "output",
    "attn.hook_z": "self_attn.o_proj.input",
    "attn.o.hook_in": "self_attn.o_proj.input",
    "attn.hook_v": "self_attn.v_proj.output",
}
LLAMA = GEMMA | {
    "hook_attn_out": "self_attn.output",
    "hook_resid_mid": "post_attention_layernorm.input",
    "hook_mlp_in": "post_attention_layernorm.input",
    "mlp.hook_in": "post_attention_layernorm.output",
    "hook_mlp_out": "mlp.output",
}
GPT_2 = {
    "hook_resid_pre": "input",
    "hook_in": "input",
    "hook_attn_out": "attn.output",
    "hook_resid_mid": "ln_2.input",
    "hook_mlp_in": "ln_2.input",
    "mlp.hook_in": "ln_2.output",
    "mlp.hook_post": "mlp.c_proj.input",
    "mlp.out.hook_in": "mlp.c_proj.input",
    "hook_mlp_out": "mlp.output",
    "hook_resid_post": "output",
    "hook_out": "output",
    "attn.hook_z": "attn.c_proj.input",
    "attn.o.hook_in": "attn.c_proj.input",
}
PYTHIA = {
    "hook_resid_pre": "input",
    "hook_in": "input",
    "hook_attn_out": "attention.output",
    "mlp.hook_in": "post_attention_layernorm.output",
    "mlp.hook_post": "mlp.dense_4h_to_h.input",
    "mlp.out.hook_in": "mlp.dense_4h_to_h.input",
    "hook_mlp_out": "mlp.output",
    "hook_resid_post": "output",
    "hook_out": "output",
    "attn.hook_z": "attention.dense.input",
    "attn.o.hook_in": "attention.dense.input",
}
# No norm stands before this MLP, and the two that stand before a sum are not those of Gemma by their names' meaning.
OLMO_2 = {name: end for name, end in GEMMA.items() if name != "mlp.hook_in"} | {
    "hook_resid_mid": "mlp.input",
    "hook_mlp_in": "mlp.input",
}
TABLE = {
    "gemma_2": GEMMA,
    "gemma_3_text": GEMMA,
    "gemma_3_with_images": GEMMA,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen_2": LLAMA,
    "qwen_3": LLAMA,
    "olmo_2": OLMO_2,
    "gpt_2": GPT_2,
    "pythia": PYTHIA,
}


def _ends(causal_lm: Any, layers: str) -> dict[str, torch.Tensor]:
    """Return what goes into and comes out of every module of one layer, by its path below the layer."""
    ends: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: Any, given: Any, keywords: Any, output: Any) -> None:
            ends[f"{path}.input".lstrip(".")] = given[0] if given else keywords.get("hidden_states")
            ends[f"{path}.output".lstrip(".")] = output[0] if isinstance(output, tuple) else output

        return hook

    layer = causal_lm.get_submodule(f"{layers}.{LAYER}")
    handles = [module.register_forward_hook(keep(path), with_kwargs=True) for path, module in layer.named_modules()]
    token_ids, mask = token_batch((7, 3))
    with torch.no_grad():
        causal_lm(input_ids=token_ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return ends


@pytest.mark.parametrize("family", TABLE)
def test_a_name_of_transformer_lens_is_the_tensor_of_its_module(family: str) -> None:
    causal_lm = CASES[family].model()
    ends = _ends(causal_lm, CASES[family].layout.layers)
    named = {name: parse_site(f"blocks.{LAYER}.{name}") for name in TABLE[family]}
    sites = captured(load_model(causal_lm), *token_batch((7, 3)), *set(named.values()))
    for name, end in TABLE[family].items():
        assert torch.equal(ends[end], sites[named[name]]), f"blocks.{LAYER}.{name} is not {named[name]}"


def test_the_bare_norm_is_the_normed_one_without_its_gain() -> None:
    causal_lm = CASES["gemma_2"].model()
    normed = _ends(causal_lm, "model.layers")["pre_feedforward_layernorm.output"]
    gain = 1 + causal_lm.model.layers[LAYER].pre_feedforward_layernorm.weight
    site = parse_site(f"blocks.{LAYER}.ln2.hook_normalized")
    found = captured(load_model(causal_lm), *token_batch((7, 3)), site)[site]
    torch.testing.assert_close(found * gain, normed)
