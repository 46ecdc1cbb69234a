"""OpenAI's SAEs of GPT-2 small: `LOCATION_VERSION/autoencoders/LAYER.pt`, a state that says which activation it has.

TopK: pre = (layer norm of x - pre_bias) · encoder + latent_bias, the k largest, then a ReLU; the norm undone behind
ReLU: the same of x itself, without k
"""

from __future__ import annotations

import re

from actstore.sites import Site

from .coder import Normalisation
from .config import Config
from .declaration import Declaration, without_threshold

__all__ = ["VALUES", "declare"]

VALUES = frozenset(("activation", "activation_state_dict", "activation.k", "activation.postact_fn"))  # not tensors

_STATISTICS = frozenset(("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"))  # of training
_KINDS = {
    "mlp_post_act": "mlp_act",
    "resid_delta_attn": "attn_out",
    "resid_delta_mlp": "mlp_out",
    "resid_post_attn": "resid_mid",
    "resid_post_mlp": "resid_post",
}
_PATH = re.compile(rf"(?:.*/)?(?P<location>{'|'.join(_KINDS)})(?:_v[^/]*)?/autoencoders/(?P<layer>\d+)\.pt")


def declare(config: Config, path: str) -> Declaration:
    """Return what the values beside the tensors and the file's path say; other activations are faults."""
    config.require("activation", "ReLU", "TopK")
    is_topk = config.text("activation", "ReLU") == "TopK"
    k = _k(config) if is_topk else None
    named = _PATH.fullmatch(path)
    return Declaration(
        f"topk k={k} x-b_dec {Normalisation.LAYER_NORM}" if is_topk else "standard x-b_dec",
        {"w_enc": "encoder.weight", "b_enc": "latent_bias", "w_dec": "decoder.weight", "b_dec": "pre_bias"},
        "a state of encoder.weight (d_sae, d_in), decoder.weight (d_in, d_sae), pre_bias, latent_bias, activation",
        turned=frozenset({"w_enc", "w_dec"}),
        ignored=_STATISTICS,
        sites=(Site(_KINDS[named["location"]], int(named["layer"])),) if named else (),
        declared_l0=None if k is None else float(k),
        k=k,
        subtracts_b_dec=True,
        normalisation=Normalisation.LAYER_NORM if is_topk else Normalisation.NONE,
        fold=without_threshold,
    )


def _k(config: Config) -> int | None:
    state = config.inner("activation_state_dict")
    state.require("postact_fn", "ReLU")
    k = state.count("k")
    if k is None:
        config.faults.append("activation_state_dict.k is missing")
    return k
