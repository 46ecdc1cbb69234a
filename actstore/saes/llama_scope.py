"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`, trained on rows of norm √d_in.

The norms of the training rows are folded into the arrays, so that features are in units of the raw activation; then
the decoder rows' norms are, so that they are 1 (the training code's own way to load a model).
"""

from __future__ import annotations

import math
import re

import numpy as np

from .config import Config
from .declaration import Arrays, Declaration, rescale_by_decoder_norm
from .hooks import sites_of_hooks

__all__ = ["declare"]

_FOLDER = re.compile(r"(?:.*/)?[^/]*-L(?P<layer>\d+)(?P<kind>R|A|M|TC)-\d+x")
_HOOKS = {"R": "resid_post", "A": "attn_out", "M": "mlp_out", "TC": "ln2_normalized"}
_WRITES = "mlp_out"  # of a transcoder


def declare(config: Config, folder: str) -> Declaration:
    """Return what a `hyperparams.json` says; other activations and normalisations are faults.

    A folder named `…L5TC-8x` holds a transcoder; one of another name does where its two hooks differ.
    """
    config.require("act_fn", "jumprelu")
    config.require("norm_activation", "dataset-wise")
    config.require("sparsity_include_decoder_norm", True)
    for name in ("apply_decoder_bias_to_pre_encoder", "use_glu_encoder"):
        config.require(name, False)
    named = _FOLDER.fullmatch(folder)
    read, written = (config.text(f"hook_point_{end}", _hook_of(named, end)) for end in ("in", "out"))
    transcodes = named["kind"] == "TC" if named else read != (written or read)
    if not transcodes:
        config.require("hook_point_out", read)
    threshold, norms = config.number("jump_relu_threshold"), config.inner("dataset_average_activation_norm")
    norm_in, norm_out = norms.number("in"), norms.number("out")
    config.faults += [
        f"{name} is missing"
        for name, value in (
            ("jump_relu_threshold", threshold),
            ("dataset_average_activation_norm.in", norm_in),
            ("dataset_average_activation_norm.out", norm_out),
        )
        if value is None
    ]

    def fold(arrays: Arrays) -> Arrays:
        assert threshold and norm_in and norm_out, "a configuration without them is refused"
        return _in_raw_units(arrays, norm_in, norm_out, threshold)

    return Declaration(
        f"jumprelu threshold={threshold} norm_in={norm_in} norm_out={norm_out}",
        {"w_enc": "encoder.weight", "b_enc": "encoder.bias", "w_dec": "decoder.weight", "b_dec": "decoder.bias"},
        "safetensors encoder.weight (d_sae, d_in), encoder.bias, decoder.weight (d_in, d_sae), decoder.bias",
        turned=frozenset({"w_enc", "w_dec"}),
        sites=sites_of_hooks(read),
        transcodes=transcodes,
        write_sites=sites_of_hooks(written) if transcodes else (),
        d_in=config.count("d_model"),
        d_out=config.count("d_model"),
        d_sae=config.count("d_sae"),
        declared_l0=config.number("top_k"),
        unit_decoder=True,
        fold=fold,
    )


def _in_raw_units(arrays: Arrays, norm_in: float, norm_out: float, threshold: float) -> Arrays:
    root = math.sqrt(len(arrays["b_dec"]))
    scale_in, scale_out = root / norm_in, root / norm_out
    raw = {
        "w_enc": arrays["w_enc"],
        "b_enc": arrays["b_enc"] / np.float32(scale_in),
        "w_dec": arrays["w_dec"] * np.float32(scale_in / scale_out),
        "b_dec": arrays["b_dec"] / np.float32(scale_out),
        "threshold": np.full_like(arrays["b_enc"], threshold),
    }
    return rescale_by_decoder_norm(raw)


def _hook_of(named: re.Match[str] | None, end: str) -> str:
    if not named:
        return ""
    kind = _WRITES if (named["kind"], end) == ("TC", "out") else _HOOKS[named["kind"]]
    return f"{kind}.{named['layer']}"
