"""Gemma Scope's two layouts: `params.npz` alone, and `params.safetensors` with `config.json` (JumpReLU both)."""

from __future__ import annotations

from .config import Config
from .declaration import Declaration
from .hooks import sites_of_hooks

__all__ = ["declare_first", "declare_second"]

_TENSORS = {name: name for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")}


def declare_first(_config: Config, _folder: str) -> Declaration:
    """Return what every `params.npz` is; what it reads stands in its path."""
    return Declaration(
        "jumprelu",
        _TENSORS,
        "an npz of float32 arrays W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc, b_dec, threshold",
        unit_decoder=True,
    )


def declare_second(config: Config, _folder: str) -> Declaration:
    """Return what a `config.json` of Gemma Scope 2 says; transcoders, affine terms and other types are faults."""
    config.require("type", "sae")
    config.require("architecture", "jump_relu")
    config.require("affine_connection", False)
    hook = config.text("hf_hook_point_in")
    config.require("hf_hook_point_out", hook)
    return Declaration(
        "jumprelu",
        _TENSORS,
        "safetensors w_enc (d_in, d_sae), w_dec (d_sae, d_in), b_enc, b_dec, threshold, and type sae in config.json",
        sites=sites_of_hooks(hook),
        d_sae=config.count("width"),
        declared_l0=config.number("l0"),
    )
