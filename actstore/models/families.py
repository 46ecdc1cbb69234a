"""Where each site is, per architecture: descriptions only, read by one capture loop that knows no family.

To add an architecture, add a `Family` here; a new way of deriving a site from a tensor is one entry in
`transforms.py`. What is said here is not trusted: `proof.py` checks it on every model that is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = ["FAMILIES", "Family", "Norm", "Tap", "Transform"]

Norm = Literal["rms", "layer"]
Transform = Literal[
    "rms_normalized",
    "layer_normalized",
    "heads_joined",
    "positions_first_heads_joined",
    "first_third",
    "second_third",
    "last_third",
    "first_third_of_each_head",
    "second_third_of_each_head",
    "last_third_of_each_head",
]


@dataclass(frozen=True)
class Tap:
    """Where one kind of site is: an end of a module, by its path below the causal language model.

    An input is the module's first positional argument, or `keyword` where it is called with keywords only.
    An output that is a tuple is represented by its `element`; whether it is one depends on the library's version.
    The end "rows" is the rows of an embedding's weight that its input names: what it returns may be scaled.
    """

    module: str  # may contain {layer}
    end: Literal["input", "output", "rows"]
    # An attribute of ModelFacts; `n_heads` is that of `pattern`, which has so many columns for every key.
    width: Literal["d_model", "d_mlp", "query_width", "kv_width", "n_heads"]
    keyword: str = "hidden_states"
    element: int = 0
    transform: Transform | None = None  # applied to the tensor found there


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: its taps by kind of site, and the modules that lenses need."""

    architecture: str  # the class named in config.json
    taps: Mapping[str, Tap]
    final_norm: str
    attention_output: str  # the linear module that maps z to attn_out_raw
    mlp_output: str  # the linear module that maps mlp_act to mlp_out_raw
    embedding_is_scaled: bool = False  # resid_pre.0 is embed_raw · √d_model
    position_embedding: str | None = None  # an embedding of the position, added to that of the token
    mlp_pre_norm: str | None = None  # from resid_mid (resid_pre where blocks are parallel) to ln2
    attention_post_norm: str | None = None  # from attn_out_raw to attn_out
    mlp_post_norm: str | None = None  # from mlp_out_raw to mlp_out
    norm: Norm = "rms"
    norm_gain_offset: float = 0.0  # the gain is offset + weight
    weights_are_inputs_first: bool = False  # of the two linear modules: (in, out), where torch has (out, in)
    norm_eps_key: str = "rms_norm_eps"  # names in config.json, or in its text_config
    d_mlp_key: str = "intermediate_size"  # 4 · d_model where the configuration has none
    final_softcap_key: str | None = None
    parallel_key: str | None = None  # true: attention and MLP both read resid_pre, and there is no resid_mid
    discovered: bool = False  # by structure: loading proves all its sites but patterns


_LAYER = "model.layers.{layer}"


def _block(layer: str = _LAYER) -> dict[str, Tap]:
    """Return the taps of a block with norms before attention and MLP, and nothing behind them."""
    return {
        "resid_pre": Tap(layer, "input", "d_model"),
        "q": Tap(f"{layer}.self_attn.q_proj", "output", "query_width"),
        "k": Tap(f"{layer}.self_attn.k_proj", "output", "kv_width"),
        "v": Tap(f"{layer}.self_attn.v_proj", "output", "kv_width"),
        "pattern": _pattern(f"{layer}.self_attn"),
        "z": Tap(f"{layer}.self_attn.o_proj", "input", "query_width"),
        "attn_out_raw": Tap(f"{layer}.self_attn", "output", "d_model"),
        "attn_out": Tap(f"{layer}.self_attn", "output", "d_model"),
        **_pre_norm(f"{layer}.post_attention_layernorm", "rms_normalized"),
        "mlp_act": Tap(f"{layer}.mlp.down_proj", "input", "d_mlp"),
        "mlp_out_raw": Tap(f"{layer}.mlp", "output", "d_model"),
        "mlp_out": Tap(f"{layer}.mlp", "output", "d_model"),
        "resid_post": Tap(layer, "output", "d_model"),
    }


def _pattern(module: str) -> Tap:
    """Return the tap of the weights that an attention module returns beside its output."""
    return Tap(module, "output", "n_heads", element=1)


def _pre_norm(module: str, transform: Transform) -> dict[str, Tap]:
    """Return the taps around the norm before the MLP."""
    return {
        "resid_mid": Tap(module, "input", "d_model"),
        "ln2_normalized": Tap(module, "input", "d_model", transform=transform),
        "ln2": Tap(module, "output", "d_model"),
    }


def _post_norms(layer: str = _LAYER) -> dict[str, Tap]:
    """Return the taps of a block whose attention and MLP are normed before they are added."""
    return {
        "attn_out": Tap(f"{layer}.post_attention_layernorm", "output", "d_model"),
        "mlp_out": Tap(f"{layer}.post_feedforward_layernorm", "output", "d_model"),
    }


def _normed_queries(transform: Transform | None, layer: str = _LAYER) -> dict[str, Tap]:
    """Return the taps of queries and keys that have a norm of their own."""
    return {
        "q": Tap(f"{layer}.self_attn.q_norm", "output", "query_width", transform=transform),
        "k": Tap(f"{layer}.self_attn.k_norm", "output", "kv_width", transform=transform),
    }


def _fused_queries(module: str, thirds: tuple[Transform, Transform, Transform]) -> dict[str, Tap]:
    """Return the taps of queries, keys and values that one module computes together."""
    return {
        kind: Tap(module, "output", "query_width", transform=third)
        for kind, third in zip(("q", "k", "v"), thirds, strict=True)
    }


def _ends(embedding: str, final_norm: str) -> dict[str, Tap]:
    """Return the taps before the first layer and behind the last."""
    return {
        "embed_raw": Tap(embedding, "rows", "d_model", keyword="input"),
        "final": Tap(final_norm, "output", "d_model"),
    }


def _gemma_block(layer: str) -> dict[str, Tap]:
    pre_norm = _pre_norm(f"{layer}.pre_feedforward_layernorm", "rms_normalized")
    return {**_block(layer), **pre_norm, **_post_norms(layer)}


def _llama(architecture: str, **taps: Tap) -> Family:
    """Return an architecture whose modules have the names that most have taken over."""
    return Family(
        architecture=architecture,
        taps=MappingProxyType({**_block(), **_ends("model.embed_tokens", "model.norm"), **taps}),
        final_norm="model.norm",
        attention_output=f"{_LAYER}.self_attn.o_proj",
        mlp_output=f"{_LAYER}.mlp.down_proj",
        mlp_pre_norm=f"{_LAYER}.post_attention_layernorm",
    )


def _gemma_3(architecture: str, root: str, final_softcap_key: str | None) -> Family:
    layer = f"{root}.layers.{{layer}}"
    queries = _normed_queries("positions_first_heads_joined", layer)
    return Family(
        architecture=architecture,
        taps=MappingProxyType({**_gemma_block(layer), **queries, **_ends(f"{root}.embed_tokens", f"{root}.norm")}),
        final_norm=f"{root}.norm",
        attention_output=f"{layer}.self_attn.o_proj",
        mlp_output=f"{layer}.mlp.down_proj",
        mlp_pre_norm=f"{layer}.pre_feedforward_layernorm",
        attention_post_norm=f"{layer}.post_attention_layernorm",
        mlp_post_norm=f"{layer}.post_feedforward_layernorm",
        norm_gain_offset=1.0,
        embedding_is_scaled=True,
        final_softcap_key=final_softcap_key,
    )


GEMMA_2 = Family(
    architecture="Gemma2ForCausalLM",
    taps=MappingProxyType({**_gemma_block(_LAYER), **_ends("model.embed_tokens", "model.norm")}),
    final_norm="model.norm",
    attention_output=f"{_LAYER}.self_attn.o_proj",
    mlp_output=f"{_LAYER}.mlp.down_proj",
    mlp_pre_norm=f"{_LAYER}.pre_feedforward_layernorm",
    attention_post_norm=f"{_LAYER}.post_attention_layernorm",
    mlp_post_norm=f"{_LAYER}.post_feedforward_layernorm",
    norm_gain_offset=1.0,
    embedding_is_scaled=True,
    final_softcap_key="final_logit_softcapping",
)

_OLMO_2_TAPS = {**_block(), **_post_norms(), **_normed_queries(None), **_ends("model.embed_tokens", "model.norm")}
OLMO_2 = Family(
    architecture="Olmo2ForCausalLM",
    taps=MappingProxyType(
        {kind: tap for kind, tap in _OLMO_2_TAPS.items() if kind not in ("ln2", "ln2_normalized")}  # no norm before
        | {"resid_mid": Tap(f"{_LAYER}.mlp", "input", "d_model")}
    ),
    final_norm="model.norm",
    attention_output=f"{_LAYER}.self_attn.o_proj",
    mlp_output=f"{_LAYER}.mlp.down_proj",
    attention_post_norm=f"{_LAYER}.post_attention_layernorm",
    mlp_post_norm=f"{_LAYER}.post_feedforward_layernorm",
)

_GPT_2_LAYER = "transformer.h.{layer}"
GPT_2 = Family(
    architecture="GPT2LMHeadModel",
    taps=MappingProxyType(
        {
            "resid_pre": Tap(_GPT_2_LAYER, "input", "d_model"),
            **_fused_queries(f"{_GPT_2_LAYER}.attn.c_attn", ("first_third", "second_third", "last_third")),
            "pattern": _pattern(f"{_GPT_2_LAYER}.attn"),
            "z": Tap(f"{_GPT_2_LAYER}.attn.c_proj", "input", "query_width"),
            "attn_out_raw": Tap(f"{_GPT_2_LAYER}.attn", "output", "d_model"),
            "attn_out": Tap(f"{_GPT_2_LAYER}.attn", "output", "d_model"),
            **_pre_norm(f"{_GPT_2_LAYER}.ln_2", "layer_normalized"),
            "mlp_act": Tap(f"{_GPT_2_LAYER}.mlp.c_proj", "input", "d_mlp"),
            "mlp_out_raw": Tap(f"{_GPT_2_LAYER}.mlp", "output", "d_model"),
            "mlp_out": Tap(f"{_GPT_2_LAYER}.mlp", "output", "d_model"),
            "resid_post": Tap(_GPT_2_LAYER, "output", "d_model"),
            **_ends("transformer.wte", "transformer.ln_f"),
        }
    ),
    final_norm="transformer.ln_f",
    attention_output=f"{_GPT_2_LAYER}.attn.c_proj",
    mlp_output=f"{_GPT_2_LAYER}.mlp.c_proj",
    mlp_pre_norm=f"{_GPT_2_LAYER}.ln_2",
    position_embedding="transformer.wpe",
    norm="layer",
    weights_are_inputs_first=True,
    norm_eps_key="layer_norm_epsilon",
    d_mlp_key="n_inner",
)

_NEOX_LAYER = "gpt_neox.layers.{layer}"
GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    taps=MappingProxyType(
        {
            "resid_pre": Tap(_NEOX_LAYER, "input", "d_model"),
            **_fused_queries(
                f"{_NEOX_LAYER}.attention.query_key_value",
                ("first_third_of_each_head", "second_third_of_each_head", "last_third_of_each_head"),
            ),
            "pattern": _pattern(f"{_NEOX_LAYER}.attention"),
            "z": Tap(f"{_NEOX_LAYER}.attention.dense", "input", "query_width"),
            "attn_out_raw": Tap(f"{_NEOX_LAYER}.attention", "output", "d_model"),
            "attn_out": Tap(f"{_NEOX_LAYER}.attention", "output", "d_model"),
            **_pre_norm(f"{_NEOX_LAYER}.post_attention_layernorm", "layer_normalized"),
            "mlp_act": Tap(f"{_NEOX_LAYER}.mlp.dense_4h_to_h", "input", "d_mlp"),
            "mlp_out_raw": Tap(f"{_NEOX_LAYER}.mlp", "output", "d_model"),
            "mlp_out": Tap(f"{_NEOX_LAYER}.mlp", "output", "d_model"),
            "resid_post": Tap(_NEOX_LAYER, "output", "d_model"),
            **_ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
        }
    ),
    final_norm="gpt_neox.final_layer_norm",
    attention_output=f"{_NEOX_LAYER}.attention.dense",
    mlp_output=f"{_NEOX_LAYER}.mlp.dense_4h_to_h",
    mlp_pre_norm=f"{_NEOX_LAYER}.post_attention_layernorm",
    norm="layer",
    norm_eps_key="layer_norm_eps",
    parallel_key="use_parallel_residual",
)

_ALL = (
    GEMMA_2,
    _gemma_3("Gemma3ForCausalLM", "model", "final_logit_softcapping"),
    _gemma_3("Gemma3ForConditionalGeneration", "model.language_model", None),  # its head applies no cap
    _llama("LlamaForCausalLM"),
    _llama("MistralForCausalLM"),
    _llama("Qwen2ForCausalLM"),
    _llama("Qwen3ForCausalLM", **_normed_queries("heads_joined")),
    OLMO_2,
    GPT_2,
    GPT_NEOX,
)
FAMILIES: Mapping[str, Family] = MappingProxyType({family.architecture: family for family in _ALL})
