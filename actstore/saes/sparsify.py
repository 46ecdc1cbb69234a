"""EleutherAI sparsify: `cfg.json` and `sae.safetensors` in a folder that is called like the module it was trained on.

An SAE reads the module's output; what has `transcode` reads the module's input, as it is, and writes its output.
"""

from __future__ import annotations

import re

from actstore.sites import Site

from .config import Config
from .declaration import Declaration, without_threshold
from .hooks import sites_of_hooks

__all__ = ["declare"]

_MLP = re.compile(r"(?:.*\.)?(?:layers|h)\.(?P<layer>\d+)\.mlp")
_TENSORS = {"w_enc": "encoder.weight", "b_enc": "encoder.bias", "w_dec": "w_dec", "b_dec": "b_dec"}
_KEYS = frozenset(
    (
        "activation",
        "d_in",
        "expansion_factor",
        "k",
        "multi_topk",
        "normalize_decoder",
        "num_latents",
        "signed",
        "skip_connection",
        "transcode",
    )
)


def declare(config: Config, folder: str) -> Declaration:
    """Return what a `cfg.json` says: the k largest of (x - b_dec) · encoder + bias, then a ReLU.

    A transcoder subtracts nothing. A layer's input and output are the residual stream before and after it.
    """
    config.only(_KEYS)
    config.require("activation", "topk")
    config.require("signed", False)
    transcodes, has_skip = config.flag("transcode", False), config.flag("skip_connection", False)
    module = folder.rpartition("/")[2]
    output = sites_of_hooks(module)
    k, d_in = config.count("k"), config.count("d_in")
    if k is None:
        config.faults.append("k is missing")
    return Declaration(
        f"topk k={k}" + ("" if transcodes else " x-b_dec") + (" skip" if has_skip else ""),
        _TENSORS | ({"w_skip": "w_skip"} if has_skip else {}),
        "safetensors encoder.weight (d_sae, d_in), encoder.bias, W_dec (d_sae, d_out), b_dec; W_skip (d_out, d_in) "
        "where cfg.json has skip_connection true",
        turned=frozenset({"w_enc", "w_skip"} if has_skip else {"w_enc"}),
        sites=_inputs(module) if transcodes else output,
        transcodes=transcodes,
        write_sites=output if transcodes else (),
        d_in=d_in,
        d_sae=_n_latents(config, d_in),
        k=k,
        subtracts_b_dec=not transcodes,
        unit_decoder=config.flag("normalize_decoder", True) and not transcodes,  # whose decoder begins at 0
        fold=without_threshold,
    )


def _inputs(module: str) -> tuple[Site, ...]:
    """Return what a module reads: an MLP reads the norm's output with its gain, a layer the residual stream."""
    if mlp := _MLP.fullmatch(module):
        return (Site("ln2", int(mlp["layer"])),)
    return sites_of_hooks(f"{module}.input")


def _n_latents(config: Config, d_in: int | None) -> int | None:
    """Return the number of latents; 0 and nothing mean d_in times the expansion factor."""
    if config.body.get("num_latents"):
        return config.count("num_latents")
    factor = config.count("expansion_factor")
    return d_in * factor if d_in and factor else None
