"""dictionary_learning: `ae.pt`, the state of one of its classes, and `config.json` that names the class."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from .config import Config
from .declaration import Arrays, Declaration, as_they_are, gate_as_threshold, without_threshold
from .faults import Unreadable
from .hooks import sites_of_hooks

__all__ = ["declare"]

_MODULE = re.compile(r"resid_post_layer_(\d+)")
_LINEAR = {"w_enc": "encoder.weight", "b_enc": "encoder.bias", "w_dec": "decoder.weight"}
_PLAIN = {"w_enc": "w_enc", "b_enc": "b_enc", "w_dec": "w_dec", "b_dec": "b_dec"}
_TURNED = frozenset({"w_enc", "w_dec"})


@dataclass(frozen=True)
class _Class:
    """One class of the library: its tensors, whether it subtracts the decoder's bias, what becomes of its arrays."""

    architecture: str
    tensors: Mapping[str, str]
    turned: frozenset[str]
    subtracts_b_dec: bool
    fold: Callable[[Arrays], Arrays]
    ignored: frozenset[str] = frozenset()


_TOP = _LINEAR | {"b_dec": "b_dec"}
_ONE = {"one_threshold": "threshold"}
_GATED = {"w_enc": "encoder.weight", "w_dec": "decoder.weight", "b_dec": "decoder_bias"}
_MAGNITUDE = {"b_enc": "mag_bias", "b_gate": "gate_bias", "r_mag": "r_mag"}
_UNUSED = frozenset({"k", "group_sizes"})  # what training went by
_CLASSES = {
    "AutoEncoder": _Class("standard", _LINEAR | {"b_dec": "bias"}, _TURNED, True, without_threshold),
    "AutoEncoderNew": _Class("standard", _LINEAR | {"b_dec": "decoder.bias"}, _TURNED, False, without_threshold),
    "GatedAutoEncoder": _Class("gated", _GATED | _MAGNITUDE, _TURNED, True, gate_as_threshold),
    "AutoEncoderTopK": _Class("topk", _TOP | {"k": "k"}, _TURNED, True, without_threshold, frozenset({"threshold"})),
    "BatchTopKSAE": _Class("jumprelu", _TOP | _ONE, _TURNED, True, as_they_are, _UNUSED),
    "MatryoshkaBatchTopKSAE": _Class("jumprelu", _PLAIN | _ONE, frozenset(), True, as_they_are, _UNUSED),
    "JumpReluAutoEncoder": _Class("jumprelu", _PLAIN | {"threshold": "threshold"}, frozenset(), False, as_they_are),
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
        scalars=frozenset({"k", "one_threshold"} & known.tensors.keys()),
        ignored=known.ignored,
        sites=sites_of_hooks(f"resid_post.{module[1]}" if module else ""),
        d_in=trainer.count("activation_dim"),
        d_sae=trainer.count("dict_size"),
        k=k,
        subtracts_b_dec=known.subtracts_b_dec,
        fold=partial(_fold, then=known.fold, k=k),
    )


def _fold(arrays: Arrays, *, then: Callable[[Arrays], Arrays], k: int | None) -> Arrays:
    if k is not None and (said := arrays.pop("k").item()) != k:
        raise Unreadable([f"k is {said:g}, and {k} by its config.json"])
    if "one_threshold" in arrays:
        threshold = arrays.pop("one_threshold").item()
        if threshold <= 0:
            raise Unreadable(["its threshold is not positive: it was not trained to the end"])
        arrays["threshold"] = np.full_like(arrays["b_enc"], threshold)
    return then(arrays)
