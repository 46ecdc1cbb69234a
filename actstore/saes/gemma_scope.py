"""Gemma Scope's two layouts: `params.npz` alone, and `params.safetensors` with `config.json` (JumpReLU both)."""

from __future__ import annotations

from .config import Config
from .declaration import Declaration
from .hooks import sites_of_hooks

__all__ = ["declare_first", "declare_second"]

_TENSORS = {name: name for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")}


def declare_first(_config: Config, _folder: str) -> Declaration:
    """Return what every `params.npz` is; what it reads, and whether it writes another site, stands in its path."""
    return Declaration(
        "jumprelu",
        _TENSORS,
        "an npz of float32 arrays W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc, b_dec, threshold",
        transcodes=None,
        unit_decoder=True,
    )


def declare_second(config: Config, folder: str) -> Declaration:
    """Return what a `config.json` of Gemma Scope 2 says; other types are faults.

    A transcoder may have a skip, (d_in, d_out) and not turned: where `affine_connection` is not there, its folder's
    name says whether.
    """
    config.require("type", "sae", "transcoder")
    config.require("architecture", "jump_relu")
    read, written = config.text("hf_hook_point_in"), config.text("hf_hook_point_out")
    transcodes = config.text("type") == "transcoder"
    if not transcodes:
        config.require("hf_hook_point_out", read)
        config.require("affine_connection", False)
    has_skip = transcodes and config.flag("affine_connection", "_affine" in folder.rpartition("/")[2])
    return Declaration(
        "jumprelu skip" if has_skip else "jumprelu",
        _TENSORS | ({"w_skip": "affine_skip_connection"} if has_skip else {}),
        "safetensors w_enc (d_in, d_sae), w_dec (d_sae, d_out), b_enc, b_dec, threshold; affine_skip_connection (d_in, "
        "d_out) where config.json has type transcoder and affine_connection true",
        sites=sites_of_hooks(read),
        transcodes=transcodes,
        write_sites=sites_of_hooks(written) if transcodes else (),
        d_sae=config.count("width"),
        declared_l0=config.number("l0"),
    )
