"""Tiny random models of odd shape, and the sites of a forward pass found without the code under test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
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
    found["embed_raw"] = model.model.embed_tokens.weight.detach()[token_ids]
    found["final"] = output.hidden_states[-1]
    found["logits"] = output.logits
    return found


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 3, "head_dim": 10}
WINDOW = {"sliding_window": 4}
LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Layout:
    """Where transformers keeps the parts of a layer, and how a layer adds them up; written apart from the package."""

    layers: str = "model.layers"
    final_norm: str = "model.norm"
    embedding: str = "model.embed_tokens"
    attention: str = "self_attn"
    attention_out: str = "o_proj"
    down: str = "down_proj"
    mlp_norm: str | None = "post_attention_layernorm"
    post_norms: tuple[str, str] | None = None
    parallel: bool = False
    queries: str = "plain"


GEMMA_NORMS: dict[str, Any] = {
    "mlp_norm": "pre_feedforward_layernorm",
    "post_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
GPT_2 = Layout(
    "transformer.h", "transformer.ln_f", "transformer.wte", "attn", "c_proj", "c_proj", "ln_2", queries="thirds"
)
NEOX: dict[str, Any] = {
    "layers": "gpt_neox.layers",
    "final_norm": "gpt_neox.final_layer_norm",
    "embedding": "gpt_neox.embed_in",
    "attention": "attention",
    "attention_out": "dense",
    "down": "dense_4h_to_h",
    "queries": "per_head",
}


@dataclass(frozen=True)
class Case:
    """One architecture in one shape."""

    architecture: str
    layout: Layout
    config: Callable[[], Any]

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        """Return random weights: gains, biases and caps that all bend the numbers."""
        torch.manual_seed(seed)
        model = getattr(transformers, self.architecture)._from_config(self.config(), attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.3 if "norm" in name or "ln_" in name else 0.4)
        return model.eval().to(dtype)


def _case(architecture: str, layout: Layout, config: str, **sizes: Any) -> Case:
    return Case(architecture, layout, lambda: getattr(transformers, config)(**sizes))


def _gemma_3_with_images() -> Any:
    text = GROUPED | WINDOW | LAYER_TYPES | {"query_pre_attn_scalar": 10}
    return transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=1)


CASES = {
    "gemma_2": _case(
        "Gemma2ForCausalLM", Layout(**GEMMA_NORMS), "Gemma2Config", **GROUPED, **WINDOW, query_pre_attn_scalar=10
    ),
    "gemma_3_text": _case(
        "Gemma3ForCausalLM",
        Layout(**GEMMA_NORMS, queries="normed_heads_first"),
        "Gemma3TextConfig",
        **GROUPED | WINDOW | LAYER_TYPES,
        query_pre_attn_scalar=7,
        final_logit_softcapping=20.0,
    ),
    "gemma_3_with_images": Case(
        "Gemma3ForConditionalGeneration",
        Layout(
            "model.language_model.layers",
            "model.language_model.norm",
            "model.language_model.embed_tokens",
            **GEMMA_NORMS,
            queries="normed_heads_first",
        ),
        _gemma_3_with_images,
    ),
    "llama": _case("LlamaForCausalLM", Layout(), "LlamaConfig", **GROUPED),
    "llama_with_biases_tied": _case(
        "LlamaForCausalLM",
        Layout(),
        "LlamaConfig",
        **GROUPED,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "mistral": _case("MistralForCausalLM", Layout(), "MistralConfig", **GROUPED, **WINDOW),
    "qwen_2": _case(
        "Qwen2ForCausalLM",
        Layout(),
        "Qwen2Config",
        **SIZES | WINDOW,
        num_key_value_heads=2,
        use_sliding_window=True,
        max_window_layers=1,
    ),
    "qwen_2_tied": _case(
        "Qwen2ForCausalLM", Layout(), "Qwen2Config", **SIZES, num_key_value_heads=1, tie_word_embeddings=True
    ),
    "qwen_3": _case("Qwen3ForCausalLM", Layout(queries="normed_heads"), "Qwen3Config", **GROUPED),
    "qwen_3_with_biases": _case(
        "Qwen3ForCausalLM",
        Layout(queries="normed_heads"),
        "Qwen3Config",
        **GROUPED | WINDOW,
        attention_bias=True,
        use_sliding_window=True,
        max_window_layers=2,
    ),
    "olmo_2": _case(
        "Olmo2ForCausalLM",
        Layout(mlp_norm=None, post_norms=GEMMA_NORMS["post_norms"], queries="normed_flat"),
        "Olmo2Config",
        **SIZES,
        num_key_value_heads=2,
    ),
    "gpt_2": _case(
        "GPT2LMHeadModel", GPT_2, "GPT2Config", vocab_size=VOCABULARY, n_embd=24, n_layer=3, n_head=6, n_inner=36
    ),
    "gpt_2_untied": _case(
        "GPT2LMHeadModel",
        GPT_2,
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_embd=24,
        n_layer=3,
        n_head=3,
        tie_word_embeddings=False,
    ),
    "pythia": _case("GPTNeoXForCausalLM", Layout(**NEOX, parallel=True), "GPTNeoXConfig", **SIZES),
    "neox_in_sequence_without_biases": _case(
        "GPTNeoXForCausalLM",
        Layout(**NEOX),
        "GPTNeoXConfig",
        **SIZES,
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
        rotary_pct=0.5,
    ),
}
