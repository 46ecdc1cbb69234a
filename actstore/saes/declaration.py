"""What an SAE's format and configuration say of it, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from actstore.sites import Site

from .coder import Array, Normalisation

__all__ = ["Arrays", "Declaration", "as_they_are", "gate_as_threshold", "rescale_by_decoder_norm", "without_threshold"]

Arrays = dict[str, Array]


def as_they_are(arrays: Arrays) -> Arrays:
    """Return the arrays of a file that has them as a `SparseCoder` does."""
    return arrays


@dataclass(frozen=True)
class Declaration:
    """How the tensors of a file become a `SparseCoder`, and what its makers say that it reads."""

    architecture: str  # as its makers call it, then all that changes the equation: "topk k=32 x-b_dec"
    tensors: Mapping[str, str]  # our array → the tensor in the file, in any case of its letters
    accepted: str  # the layout, for messages
    turned: frozenset[str] = frozenset()  # our matrices that the file holds the other way round
    scalars: frozenset[str] = frozenset()  # arrays of one number each, that `fold` takes
    ignored: frozenset[str] = frozenset()  # tensors that the file may hold and the equation does not need
    optional: Mapping[str, str] = field(default_factory=dict)  # arrays that `fold` takes where they are there
    sites: tuple[Site, ...] = ()  # more than one where its configuration has names of it that differ
    transcodes: bool | None = False  # reconstructs another site than it reads; None where the file cannot tell
    write_sites: tuple[Site, ...] = ()  # of a transcoder, as `sites`
    position: int | None = None  # of a coder of several layers: which it is; its decoder has an axis of layers
    n_layers: int | None = None  # where that is known
    d_in: int | None = None
    d_out: int | None = None
    d_sae: int | None = None
    declared_l0: float | None = None
    k: int | None = None
    subtracts_b_dec: bool = False
    normalisation: Normalisation = Normalisation.NONE
    unit_decoder: bool = False  # decoder rows of norm 1 are promised
    fold: Callable[[Arrays], Arrays] = as_they_are  # from the file's arrays to the five of a `SparseCoder`

    @property
    def names(self) -> dict[str, str]:
        """Return our name of every tensor that the file may hold, by its name there in small letters."""
        return {name.lower(): ours for ours, name in (*self.tensors.items(), *self.optional.items())}


def without_threshold(arrays: Arrays) -> Arrays:
    """Return the arrays with thresholds of 0: a ReLU."""
    return arrays | {"threshold": np.zeros_like(arrays["b_enc"])}


def gate_as_threshold(arrays: Arrays) -> Arrays:
    """Return a gated coder's arrays as those of a threshold; `b_enc` is its b_mag.

    With s = exp(r_mag) it fires where z · W + b_gate > 0, with s · (z · W) + b_mag where that is positive. Both depend
    on pre = z · (W · s) + b_mag alone: it fires where pre > max(0, b_mag - s · b_gate).
    """
    scale = np.exp(arrays["r_mag"].astype(np.float64))
    threshold = np.maximum(0.0, arrays["b_enc"] - scale * arrays["b_gate"])
    rest = {name: array for name, array in arrays.items() if name not in ("r_mag", "b_gate")}
    w_enc = arrays["w_enc"] * scale.astype(np.float32)
    return rest | {"w_enc": w_enc, "threshold": threshold.astype(np.float32)}


def rescale_by_decoder_norm(arrays: Arrays) -> Arrays:
    """Return the arrays with decoder rows of norm 1 and features as much larger; of rows of zeros none ever fires."""
    norm = np.linalg.norm(arrays["w_dec"], axis=1).astype(np.float32)
    return arrays | {
        "w_enc": arrays["w_enc"] * norm,
        "b_enc": arrays["b_enc"] * norm,
        "w_dec": arrays["w_dec"] / np.where(norm > 0, norm, 1)[:, None],
    }
