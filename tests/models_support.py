"""Tiny random Gemma 2 models of odd shape, and the sites of a forward pass found without the code under test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from actstore.models import LoadedModel
from actstore.sites import Site

torch.set_num_threads(1)

N_LAYERS = 3
VOCABULARY = 97


def tiny_config(**changes: Any) -> Gemma2Config:
    """Return a configuration in which no two widths agree, with a window shorter than the tests' texts."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "query_pre_attn_scalar": 10,
        "sliding_window": 4,
        "max_position_embeddings": 64,
    }
    return Gemma2Config(**sizes | changes)


def tiny_model(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Gemma2ForCausalLM:
    """Return a random model whose norms have gains and whose caps bend the numbers."""
    torch.manual_seed(seed)
    model = Gemma2ForCausalLM._from_config(tiny_config(**changes), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if "norm" in name else 0.4)
    return model.to(dtype)


def save_tiny_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    tiny_model(seed, **changes).save_pretrained(folder)
    return folder


def token_batch(lengths: tuple[int, ...], seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random token ids and their mask, int64 (sequence, position), padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    return token_ids, (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


def captured(model: LoadedModel, token_ids: torch.Tensor, mask: torch.Tensor, *sites: Site) -> dict[Site, torch.Tensor]:
    found: dict[Site, torch.Tensor] = {}

    def deposit(site: Site, values: torch.Tensor) -> None:
        assert site not in found
        found[site] = values.clone()

    model.capture(token_ids, mask, sites, deposit)
    return found


def reference_sites(model: Gemma2ForCausalLM, token_ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return every site's values from one whole pass: hidden states where transformers has them, else raw hooks."""
    found: dict[str, torch.Tensor] = {}
    handles = []

    def keep(module: torch.nn.Module, *, before: str = "", after: str = "") -> None:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            if before:
                found[before] = inputs[0]
            if after:
                found[after] = output[0] if isinstance(output, tuple) else output

        handles.append(module.register_forward_hook(hook))

    for index, layer in enumerate(model.model.layers):
        keep(layer.self_attn.q_proj, after=f"q.{index}")
        keep(layer.self_attn.k_proj, after=f"k.{index}")
        keep(layer.self_attn.v_proj, after=f"v.{index}")
        keep(layer.self_attn.o_proj, before=f"z.{index}", after=f"attn_out_raw.{index}")
        keep(layer.post_attention_layernorm, after=f"attn_out.{index}")
        keep(layer.pre_feedforward_layernorm, before=f"resid_mid.{index}", after=f"ln2.{index}")
        keep(layer.mlp.down_proj, before=f"mlp_act.{index}", after=f"mlp_out_raw.{index}")
        keep(layer.post_feedforward_layernorm, after=f"mlp_out.{index}")
    with torch.no_grad():
        output = model(input_ids=token_ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    for index in range(N_LAYERS):
        found[f"resid_pre.{index}"] = output.hidden_states[index]
        found[f"resid_post.{index}"] = found[f"resid_mid.{index}"] + found[f"mlp_out.{index}"]
        squares = found[f"resid_mid.{index}"].double().pow(2).mean(-1, keepdim=True)
        found[f"ln2_normalized.{index}"] = found[f"resid_mid.{index}"].double() / (squares + 1e-6).sqrt()
    found["final"] = output.hidden_states[-1]
    found["logits"] = output.logits
    return found
