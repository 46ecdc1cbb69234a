"""Where each site is, per architecture: descriptions only, read by one capture loop that knows no family.

To add an architecture, add a `Family` here; a new way of deriving a site from a tensor is one entry in
`transforms.py`. What is said here is not trusted: `proof.py` checks it on every model that is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from actstore.errors import UnsupportedFormat, explain

__all__ = ["FAMILIES", "Family", "Tap", "family_of"]


@dataclass(frozen=True)
class Tap:
    """Where one kind of site is: an end of a module, by its path below the causal language model.

    An input is the module's first positional argument, or `keyword` where it is called with keywords only.
    An output that is a tuple is represented by its `element`; whether it is one depends on the library's version.
    """

    module: str  # may contain {layer}
    end: Literal["input", "output"]
    width: Literal["d_model", "d_mlp", "query_width", "kv_width"]  # an attribute of ModelFacts
    keyword: str = "hidden_states"
    element: int = 0
    transform: Literal["rms_normalized"] | None = None  # applied to the tensor found there


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: its taps by kind of site, and the modules that lenses need."""

    architecture: str  # the class named in config.json
    taps: Mapping[str, Tap]
    final_norm: str
    unembedding: str
    norm_gain_offset: float  # the gain is offset + weight
    attention_output: str  # the linear module that maps z to attn_out_raw
    attention_post_norm: str | None  # from attn_out_raw to attn_out
    norm_eps_key: str = "rms_norm_eps"  # names in config.json
    d_mlp_key: str = "intermediate_size"
    final_softcap_key: str = "final_logit_softcapping"


_LAYER = "model.layers.{layer}"

GEMMA_2 = Family(
    architecture="Gemma2ForCausalLM",
    taps=MappingProxyType(
        {
            "resid_pre": Tap(_LAYER, "input", "d_model"),
            "q": Tap(f"{_LAYER}.self_attn.q_proj", "output", "query_width"),
            "k": Tap(f"{_LAYER}.self_attn.k_proj", "output", "kv_width"),
            "v": Tap(f"{_LAYER}.self_attn.v_proj", "output", "kv_width"),
            "z": Tap(f"{_LAYER}.self_attn.o_proj", "input", "query_width"),
            "attn_out_raw": Tap(f"{_LAYER}.self_attn", "output", "d_model"),
            "attn_out": Tap(f"{_LAYER}.post_attention_layernorm", "output", "d_model"),
            "resid_mid": Tap(f"{_LAYER}.pre_feedforward_layernorm", "input", "d_model"),
            "ln2_normalized": Tap(
                f"{_LAYER}.pre_feedforward_layernorm", "input", "d_model", transform="rms_normalized"
            ),
            "ln2": Tap(f"{_LAYER}.pre_feedforward_layernorm", "output", "d_model"),
            "mlp_act": Tap(f"{_LAYER}.mlp.down_proj", "input", "d_mlp"),
            "mlp_out_raw": Tap(f"{_LAYER}.mlp", "output", "d_model"),
            "mlp_out": Tap(f"{_LAYER}.post_feedforward_layernorm", "output", "d_model"),
            "resid_post": Tap(_LAYER, "output", "d_model"),
            "final": Tap("model.norm", "output", "d_model"),
        }
    ),
    final_norm="model.norm",
    unembedding="lm_head",
    norm_gain_offset=1.0,
    attention_output=f"{_LAYER}.self_attn.o_proj",
    attention_post_norm=f"{_LAYER}.post_attention_layernorm",
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.architecture: family for family in (GEMMA_2,)})


def family_of(architecture: str, name: str) -> Family:
    """Return the description of an architecture; raises UnsupportedFormat, listing all, where there is none."""
    if architecture not in FAMILIES:
        raise UnsupportedFormat(
            explain(
                f"{name} is a {architecture}, whose sites are not described",
                accepted=", ".join(FAMILIES),
                next_step="choose a model of a described architecture",
            )
        )
    return FAMILIES[architecture]
