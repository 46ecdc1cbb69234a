"""EleutherAI sparsify: `cfg.json` and `sae.safetensors` in a folder that is called like the module it reads."""

from __future__ import annotations

from .config import Config
from .declaration import Declaration, without_threshold
from .hooks import sites_of_hooks

__all__ = ["declare"]

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

    The module's output is read, the residual stream after it for a layer; `transcode` and `skip_connection` are faults.
    """
    config.only(_KEYS)
    config.require("activation", "topk")
    for name in ("transcode", "skip_connection", "signed"):
        config.require(name, False)
    k, d_in = config.count("k"), config.count("d_in")
    if k is None:
        config.faults.append("k is missing")
    return Declaration(
        f"topk k={k} x-b_dec",
        {"w_enc": "encoder.weight", "b_enc": "encoder.bias", "w_dec": "w_dec", "b_dec": "b_dec"},
        "safetensors encoder.weight (d_sae, d_in), encoder.bias, W_dec (d_sae, d_in), b_dec",
        turned=frozenset({"w_enc"}),
        sites=sites_of_hooks(folder.rpartition("/")[2]),
        d_in=d_in,
        d_sae=_n_latents(config, d_in),
        k=k,
        subtracts_b_dec=True,
        unit_decoder=config.flag("normalize_decoder", True),
        fold=without_threshold,
    )


def _n_latents(config: Config, d_in: int | None) -> int | None:
    """Return the number of latents; 0 and nothing mean d_in times the expansion factor."""
    if config.body.get("num_latents"):
        return config.count("num_latents")
    factor = config.count("expansion_factor")
    return d_in * factor if d_in and factor else None
