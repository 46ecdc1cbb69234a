"""dictionary_learning: `ae.pt`, the state of one of its classes, and `config.json` that names the class."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from .config import Config
from .declaration import Arrays, Declaration, gate_as_threshold, without_threshold
from .hooks import sites_of_hooks
from .npz import Unreadable

__all__ = ["declare"]

_MODULE = re.compile(r"resid_post_layer_(\d+)")
_LINEAR = {"w_enc": "encoder.weight", "b_enc": "encoder.bias", "w_dec": "decoder.weight"}
_PLAIN = {"w_enc": "w_enc", "b_enc": "b_enc", "w_dec": "w_dec", "b_dec": "b_dec"}
_TURNED = frozenset({"w_enc", "w_dec"})


def _spread_threshold(arrays: Arrays) -> Arrays:
    rest = {name: array for name, array in arrays.items() if name != "one_threshold"}
    return rest | {"threshold": np.full_like(arrays["b_enc"], arrays["one_threshold"])}


@dataclass(frozen=True)
class _Class:
    """One class of the library: its tensors, whether it subtracts the decoder's bias, what becomes of its arrays."""

    architecture: str
    tensors: Mapping[str, str]
    turned: frozenset[str]
    subtracts_b_dec: bool
    fold: Callable[[Arrays], Arrays]
    scalars: frozenset[str] = frozenset()


_TOP = _LINEAR | {"b_dec": "b_dec", "k": "k", "one_threshold": "threshold"}
_GATED = {"w_enc": "encoder.weight", "w_dec": "decoder.weight", "b_dec": "decoder_bias"}
_CLASSES = {
    "AutoEncoder": _Class("standard", _LINEAR | {"b_dec": "bias"}, _TURNED, True, without_threshold),
    "AutoEncoderNew": _Class("standard", _LINEAR | {"b_dec": "decoder.bias"}, _TURNED, False, without_threshold),
    "GatedAutoEncoder": _Class(
        "gated",
        _GATED | {"b_enc": "mag_bias", "b_gate": "gate_bias", "r_mag": "r_mag"},
        _TURNED,
        True,
        gate_as_threshold,
    ),
    "AutoEncoderTopK": _Class("topk", _TOP, _TURNED, True, without_threshold, frozenset({"k", "one_threshold"})),
    "BatchTopKSAE": _Class("jumprelu", _TOP, _TURNED, True, _spread_threshold, frozenset({"k", "one_threshold"})),
    "MatryoshkaBatchTopKSAE": _Class(
        "jumprelu",
        _PLAIN | {"k": "k", "one_threshold": "threshold", "group_sizes": "group_sizes"},
        frozenset(),
        True,
        _spread_threshold,
        frozenset({"k", "one_threshold", "group_sizes"}),
    ),
    "JumpReluAutoEncoder": _Class(
        "jumprelu", _PLAIN | {"threshold": "threshold"}, frozenset(), False, lambda arrays: arrays
    ),
}


def declare(config: Config, _folder: str) -> Declaration:
    """Return what a `config.json` says; classes that are not known are faults."""
    trainer = config.inner("trainer")
    trainer.require("dict_class", *_CLASSES)
    name = trainer.text("dict_class")
    if not name:
        config.faults.append("trainer.dict_class is missing")
    known = _CLASSES.get(name, _CLASSES["AutoEncoder"])
    k = trainer.count("k") if known.architecture == "topk" else None
    if known.architecture == "topk" and k is None:
        config.faults.append("trainer.k is missing")
    module = _MODULE.fullmatch(trainer.text("submodule_name"))
    parts = [known.architecture, *([f"k={k}"] if k else []), *(["x-b_dec"] if known.subtracts_b_dec else [])]
    return Declaration(
        " ".join(parts),
        known.tensors,
        f"the state of a {name}: {', '.join(known.tensors.values())}",
        turned=known.turned,
        scalars=known.scalars,
        sites=sites_of_hooks(f"resid_post.{module[1]}" if module else ""),
        d_in=trainer.count("activation_dim"),
        d_sae=trainer.count("dict_size"),
        k=k,
        subtracts_b_dec=known.subtracts_b_dec,
        fold=partial(_fold, known=known, k=k),
    )


def _fold(arrays: Arrays, *, known: _Class, k: int | None) -> Arrays:
    if k is not None and float(arrays["k"]) != k:
        raise Unreadable([f"k is {float(arrays['k']):g}, and {k} by its config.json"])
    if known.architecture == "jumprelu" and "one_threshold" in arrays and not arrays["one_threshold"] > 0:
        raise Unreadable(["its threshold is not positive: it was not trained to the end"])
    unused = {"k", "group_sizes"} | ({"one_threshold"} if known.architecture == "topk" else set())
    return known.fold({name: array for name, array in arrays.items() if name not in unused})
