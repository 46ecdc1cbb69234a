"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, as version 6 writes them and as older ones did.

Transcoders take no part of b_dec from what they read. Their `hook_name` may be `hook_mlp_in`, which in TransformerLens
is the residual stream before the norm, while they were trained on the norm's output: `hf_hook_name` says what is meant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from actstore.sites import Site

from .coder import Normalisation
from .config import Config
from .declaration import Arrays, Declaration, gate_as_threshold, rescale_by_decoder_norm, without_threshold
from .faults import Unreadable
from .hooks import sites_of_hooks

__all__ = ["declare"]

_PLAIN = {name: name for name in ("w_enc", "w_dec", "b_enc", "b_dec")}
_TENSORS: Mapping[str, Mapping[str, str]] = {
    "standard": _PLAIN,
    "jumprelu": _PLAIN | {"threshold": "threshold"},
    "topk": _PLAIN,
    "gated": _PLAIN | {"b_enc": "b_mag", "b_gate": "b_gate", "r_mag": "r_mag"},
    "transcoder": _PLAIN,
    "skip_transcoder": _PLAIN | {"w_skip": "w_skip"},
    "jumprelu_transcoder": _PLAIN | {"threshold": "threshold"},
    "jumprelu_skip_transcoder": _PLAIN | {"threshold": "threshold", "w_skip": "w_skip"},
}
_KEYS = frozenset(
    (
        "architecture",
        "d_in",
        "d_out",
        "d_sae",
        "dtype",
        "device",
        "apply_b_dec_to_input",
        "normalize_activations",
        "reshape_activations",
        "k",
        "rescale_acts_by_decoder_norm",
        "metadata",
    )
)
_HOOKS = ("hook_name", "hook_point", "hf_hook_name")
_OUT_HOOKS = ("hook_name_out", "hf_hook_name_out")
_MLP_IN = re.compile(r"blocks\.(\d{1,6})\.hook_mlp_in")
_NORMALISATIONS = (Normalisation.NONE, Normalisation.LAYER_NORM, Normalisation.CONSTANT_NORM)
_CENTRED_MODELS = re.compile(r"(?:.*/)?(?:distil)?(?:gpt2|gpt-neo|pythia|opt)\b.*")  # with a LayerNorm
_OTHER_MODELS = re.compile(
    r"(?:.*/)?(?:meta-)?(?:gemma|llama|mistral|qwen|olmo-2).*", re.IGNORECASE
)  # with an RMS norm
_WRITTEN = frozenset({"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"})
_LOADED_WITH = "model_from_pretrained_kwargs"
_FOLDED_ONLY = "expected_average_only_in"


def declare(config: Config, _folder: str) -> Declaration:
    """Return what a `cfg.json` says. Other architectures, and keys that change the equation, are faults."""
    is_old = "metadata" not in config.body
    described = _described(config, is_old)
    architecture = _architecture(config, is_old)
    k = _k(config, is_old) if architecture == "topk" else None
    rescales = architecture == "topk" and config.flag("rescale_acts_by_decoder_norm", False)
    transcodes = architecture.endswith("transcoder")
    sites, write_sites = _sites(described, transcodes)
    normalisation = _centred(described, (*sites, *write_sites), _normalisation(config))
    if transcodes and normalisation is not Normalisation.NONE:
        config.faults.append(f"rows are normalised ({normalisation}), which is not read of a transcoder")
    if transcodes:
        config.require("apply_b_dec_to_input", False)
    subtracts = not transcodes and config.flag("apply_b_dec_to_input", True)
    tensors = _TENSORS.get(architecture, _PLAIN)
    return Declaration(
        _spelled(architecture, k, rescales, subtracts, normalisation),
        tensors,
        "safetensors W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc, b_dec; threshold for jumprelu; b_gate, b_mag and "
        "r_mag instead of b_enc for gated; W_dec (d_sae, d_out) for transcoders, with W_skip (d_out, d_in) for skip",
        turned=frozenset({"w_skip"} & tensors.keys()),
        optional={"scaling_factor": "scaling_factor"},
        sites=sites,
        transcodes=transcodes,
        write_sites=write_sites,
        d_in=config.count("d_in"),
        d_out=config.count("d_out"),
        d_sae=config.count("d_sae"),
        k=k,
        subtracts_b_dec=subtracts,
        normalisation=normalisation,
        fold=partial(_fold, architecture=architecture, rescales=rescales),
    )


def _described(config: Config, is_old: bool) -> Config:
    """Return what describes the training, `metadata` or the old configuration itself, after what must not be there."""
    if not is_old:
        config.only(_KEYS)
    described = config if is_old else config.inner("metadata")
    described.require("hook_head_index", None)
    described.require("hook_point_head_index", None)
    config.require("finetuning_scaling_factor", False)
    config.require("reshape_activations", "none", "hook_z")
    return described


def _sites(described: Config, transcodes: bool) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """Return the sites that are read and, of a transcoder, written; more than one where it is ambiguous.

    `hook_mlp_in` of a transcoder says nothing that `hf_hook_name` does not say better; alone it could be any of three.
    """
    names = [described.text(name) for name in _HOOKS]
    out = [described.text(name) for name in _OUT_HOOKS]
    if not transcodes:
        if different := set(out) - {"", *names}:
            described.faults.append(f"hook_name_out is {min(different)[:80]!r}, and it is no transcoder")
        return sites_of_hooks(*names), ()
    said = sites_of_hooks(*(name for name in names if not _MLP_IN.fullmatch(name)))
    unclear = next((found for name in names if (found := _MLP_IN.fullmatch(name))), None)
    if unclear and not said:
        said = tuple(Site(kind, int(unclear[1])) for kind in ("ln2", "ln2_normalized", "resid_mid"))
    return said, sites_of_hooks(*out)


def _architecture(config: Config, is_old: bool) -> str:
    """Return the architecture; in old folders the activation function could say it instead."""
    config.require("architecture", *_TENSORS)
    architecture = config.text("architecture", "standard")
    if is_old:
        config.require("activation_fn", "relu", "topk")
        config.require("activation_fn_str", "relu", "topk")
        names = (config.body.get("activation_fn"), config.body.get("activation_fn_str"))
        return "topk" if "topk" in names and architecture == "standard" else architecture
    return architecture


def _k(config: Config, is_old: bool) -> int | None:
    k = config.count("k") or (config.inner("activation_fn_kwargs").count("k") if is_old else None)
    if k is None:
        config.faults.append("k is missing")
    return k


def _normalisation(config: Config) -> Normalisation:
    value = config.body.get("normalize_activations") or "none"
    if value in (True, _FOLDED_ONLY):
        config.faults.append(
            f"normalize_activations is {_FOLDED_ONLY}, and the scale is not in the folder: load it with SAELens' "
            "from_pretrained, which multiplies the scale into the weights, and save it again"
        )
        return Normalisation.NONE
    config.require("normalize_activations", *(str(one) for one in _NORMALISATIONS), False)
    return Normalisation(value) if value in _NORMALISATIONS else Normalisation.NONE


def _centred(described: Config, sites: Sequence[Site], normalisation: Normalisation) -> Normalisation:
    """Return the normalisation of an SAE that was trained on a model with centred weights.

    TransformerLens centres what is written into the residual stream of a model with LayerNorm, which the model itself
    does not notice; on a model with an RMS norm it leaves out what is asked for. Folding value biases moves them out
    of what heads write, and is a fault where that is read.
    """
    kwargs, name = described.inner(_LOADED_WITH), described.text("model_name")
    asked = kwargs.flag("center_writing_weights", False)
    if any(site.kind in ("z", "v") for site in sites):
        kwargs.require("fold_value_biases", False)
    if not any(site.kind in _WRITTEN for site in sites) or normalisation is Normalisation.LAYER_NORM:
        return normalisation
    if "hook_point" in described.body and _LOADED_WITH not in described.body and _CENTRED_MODELS.fullmatch(name):
        described.faults.append(
            f"{_LOADED_WITH} is missing, as in the oldest folders, of which some are of centred rows: name it "
            f'saelens:release/sae_id, or add "{_LOADED_WITH}": {{"center_writing_weights": …}}, true or false'
        )
    if not asked:
        return normalisation
    if _OTHER_MODELS.fullmatch(name):
        return normalisation
    if not _CENTRED_MODELS.fullmatch(name) or normalisation is not Normalisation.NONE:
        described.faults.append(
            f"center_writing_weights is true with model_name {name[:80]!r} and normalize_activations {normalisation}, "
            "and whether its rows are centred is not known"
        )
    return Normalisation.CENTRED


def _spelled(
    architecture: str, k: int | None, rescales: bool, subtracts_b_dec: bool, normalisation: Normalisation
) -> str:
    parts = [architecture]
    parts += [f"k={k}"] if k else []
    parts += ["by_decoder_norm"] if rescales else []
    parts += ["x-b_dec"] if subtracts_b_dec else []
    parts += [str(normalisation)] if normalisation is not Normalisation.NONE else []
    return " ".join(parts)


def _fold(arrays: Arrays, *, architecture: str, rescales: bool) -> Arrays:
    scaling = arrays.pop("scaling_factor", None)
    if scaling is not None and not np.all(scaling == 1):
        raise Unreadable(["scaling_factor is not 1 everywhere, and scaled features are not read"])
    if architecture.startswith("jumprelu"):
        return arrays
    if architecture == "gated":
        return gate_as_threshold(arrays)
    return without_threshold(rescale_by_decoder_norm(arrays) if rescales else arrays)
