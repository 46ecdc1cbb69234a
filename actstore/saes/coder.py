"""A sparse coder as plain arrays, whatever file it came from and whatever its makers called its architecture.

    z = normalised(x) - b_dec where `subtracts_b_dec`       pre = z @ w_enc + b_enc
    f = pre where pre > threshold, else 0; with `k`, only the k largest of a row, ties to the lower feature
    x_hat = the normalisation undone on f @ w_dec + b_dec, plus x @ w_skip where there is a skip

A transcoder's x_hat is of another tensor than the x that it reads. One equation holds them all: a ReLU is a threshold
of 0; a gate that shares the encoder's directions is a threshold; scales and norms that a format keeps apart are
multiplied into the arrays when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from actstore.errors import InvalidInput, explain
from actstore.recipe import SaeIdentity

from .layers import LayerDecoders

__all__ = [
    "ARRAYS",
    "Array",
    "Normalisation",
    "SparseCoder",
    "check_width",
    "infinite_faults",
    "shape_faults",
    "value_faults",
]

ARRAYS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")

Array = npt.NDArray[np.float32]


class Normalisation(StrEnum):
    """What is done to a row before it is encoded, and undone on its reconstruction."""

    NONE = "none"
    LAYER_NORM = "layer_norm"  # (x - mean) / (std + 1e-5) with the unbiased std; undone by * std + mean
    CENTRED = "centred"  # x - mean
    CONSTANT_NORM = "constant_norm_rescale"  # x · √d_in / ‖x‖


@dataclass(frozen=True, eq=False)
class SparseCoder:
    """One sparse coder, float32: w_enc (d_in, d_sae), w_dec (d_sae, d_out), b_enc, threshold (d_sae), b_dec (d_out).

    w_skip (d_in, d_out) or None. d_out is d_in unless its identity has a `write_site`.
    Raises InvalidInput for arrays that do not fit together, for a k that is none, and for a transcoder that would
    subtract or undo at its input what belongs to its output.
    """

    identity: SaeIdentity
    w_enc: Array
    w_dec: Array
    b_enc: Array
    b_dec: Array
    threshold: Array
    k: int | None = None  # firings of a row at most
    subtracts_b_dec: bool = False
    normalisation: Normalisation = Normalisation.NONE
    unit_decoder: bool = True  # its makers promise decoder rows of norm 1
    w_skip: Array | None = None  # a linear map from what is read to what is written
    layers: LayerDecoders | None = None  # of a coder of several layers: where it writes the others

    def __post_init__(self) -> None:
        names = ARRAYS if self.w_skip is None else (*ARRAYS, "w_skip")
        faults = shape_faults({name: getattr(self, name).shape for name in names}, transcodes=self.transcodes)
        if not faults and self.k is not None and not 1 <= self.k <= self.d_sae:
            faults = [f"k is {self.k}, of {self.d_sae} features"]
        if self.transcodes and self.subtracts_b_dec:
            faults.append("b_dec belongs to what a transcoder writes and cannot be subtracted from what it reads")
        if self.transcodes and self.normalisation is not Normalisation.NONE:
            faults.append(f"a transcoder with normalisation {self.normalisation} has no defined output")
        if faults:
            raise InvalidInput(explain(f"The SAE {self.identity.sae} is not consistent: {'; '.join(faults)}"))

    @property
    def transcodes(self) -> bool:
        """Whether it reconstructs another site than it reads."""
        return self.identity.write_site is not None

    @property
    def is_partial(self) -> bool:
        """Whether its reconstruction alone is none: layers below it write the same site."""
        return self.layers is not None and self.layers.position > 0

    @property
    def d_in(self) -> int:
        """Width of the site that it reads."""
        return len(self.w_enc)

    @property
    def d_out(self) -> int:
        """Width of the site that it reconstructs."""
        return len(self.b_dec)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.b_enc)


def check_width(coder: SparseCoder, site_width: int, write_width: int | None = None) -> None:
    """Refuse an SAE that is not as wide as its sites: raises InvalidInput with both widths.

    write_width: of the site that a transcoder writes.
    """
    identity = coder.identity
    for verb, width, site, found in (
        ("reads", coder.d_in, identity.site, site_width),
        ("writes", coder.d_out, identity.write_site, write_width),
    ):
        if found is not None and width != found:
            raise InvalidInput(
                explain(
                    f"The SAE {identity.sae} {verb} vectors of width {width}, and the site {site} of this model has "
                    f"width {found}",
                    next_step="choose an SAE that was trained on this model, or another site behind '@'",
                )
            )


def shape_faults(shapes: Mapping[str, tuple[int, ...]], *, transcodes: bool = False) -> list[str]:
    """Return how the shapes of matrices, biases and other vectors (d_sae) disagree, by what the biases say.

    transcodes: the width of the input is not that of b_dec, and w_enc alone says it.
    """
    faults = [f"{name} is {shapes[name]}, not a vector" for name in ("b_enc", "b_dec") if len(shapes[name]) != 1]
    if faults:
        return faults
    d_sae, d_out = shapes["b_enc"][0], shapes["b_dec"][0]
    d_in = _input_width(shapes["w_enc"], d_sae, d_out) if transcodes else d_out
    if not d_sae or not d_in or not d_out:
        return [f"it has {d_sae} features of width {min(d_in, d_out)}"]
    expected: dict[str, tuple[int, ...]] = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_out)}
    if "w_skip" in shapes:
        expected["w_skip"] = (d_in, d_out)
    expected |= {name: (d_sae,) for name in sorted(shapes) if name not in (*expected, "b_dec")}
    return [_mismatch(name, shapes[name], shape) for name, shape in expected.items() if shapes[name] != shape]


def _input_width(w_enc: tuple[int, ...], d_sae: int, d_out: int) -> int:
    """Return the side of w_enc that is not d_sae, whichever way round; the output's width where neither is."""
    if len(w_enc) != 2 or d_sae not in w_enc:
        return d_out
    return w_enc[0] if w_enc[1] == d_sae else w_enc[1]


def _mismatch(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    transposed = " (it is transposed)" if len(found) == 2 and found == expected[::-1] else ""
    return f"{name} is {found}{transposed}, where b_enc and b_dec ask for {expected}"


def value_faults(arrays: Mapping[str, Array]) -> list[str]:
    """Return which arrays hold NaN or infinity, or thresholds that are not positive where there are any."""
    faults = infinite_faults(arrays)
    n_below = int(np.count_nonzero(arrays["threshold"] <= 0)) if "threshold" in arrays else 0
    return [*faults, f"{n_below} thresholds are not positive"] if n_below else faults


def infinite_faults(arrays: Mapping[str, Array]) -> list[str]:
    """Return which arrays hold NaN or infinity."""
    # The extremes carry any NaN or infinity, and need no second array of the size of the weights.
    return [f"{name} has NaN or infinity" for name in arrays if not np.isfinite([*_extremes(arrays[name])]).all()]


def _extremes(array: Array) -> tuple[np.float32, np.float32]:
    return np.min(array), np.max(array)
