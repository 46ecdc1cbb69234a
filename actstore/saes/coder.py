"""A sparse coder as plain arrays, whatever file it came from and whatever its makers called its architecture.

    z = normalised(x) - b_dec where `subtracts_b_dec`       pre = z @ w_enc + b_enc
    f = pre where pre > threshold, else 0; with `k`, only the k largest of a row, ties to the lower feature
    x_hat = the normalisation undone on f @ w_dec + b_dec

One equation holds them all: a ReLU is a threshold of 0; a gate that shares the encoder's directions is a threshold;
scales and norms that a format keeps apart are multiplied into the arrays when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from actstore.errors import InvalidInput, explain
from actstore.recipe import SaeIdentity

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
    """One sparse coder, float32: w_enc (d_in, d_sae), w_dec (d_sae, d_in), b_enc, threshold (d_sae), b_dec (d_in).

    Raises InvalidInput for arrays that do not fit together, and for a k that is none.
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

    def __post_init__(self) -> None:
        faults = shape_faults({name: getattr(self, name).shape for name in ARRAYS})
        if not faults and self.k is not None and not 1 <= self.k <= self.d_sae:
            faults = [f"k is {self.k}, of {self.d_sae} features"]
        if faults:
            raise InvalidInput(explain(f"The SAE {self.identity.sae} is not consistent: {'; '.join(faults)}"))

    @property
    def d_in(self) -> int:
        """Width of the site that it reads."""
        return len(self.b_dec)

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.b_enc)


def check_width(coder: SparseCoder, site_width: int) -> None:
    """Refuse an SAE whose input is not as wide as its site: raises InvalidInput with both widths."""
    if coder.d_in != site_width:
        raise InvalidInput(
            explain(
                f"The SAE {coder.identity.sae} reads vectors of width {coder.d_in}, and the site {coder.identity.site} "
                f"of this model has width {site_width}",
                next_step="choose an SAE that was trained on this model, or another site behind '@'",
            )
        )


def shape_faults(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return how the shapes of matrices, biases and other vectors (d_sae) disagree, by what the biases say."""
    faults = [f"{name} is {shapes[name]}, not a vector" for name in ("b_enc", "b_dec") if len(shapes[name]) != 1]
    if faults:
        return faults
    d_sae, d_in = shapes["b_enc"][0], shapes["b_dec"][0]
    if not d_sae or not d_in:
        return [f"it has {d_sae} features of width {d_in}"]
    expected: dict[str, tuple[int, ...]] = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_in)}
    expected |= {name: (d_sae,) for name in sorted(shapes) if name not in (*expected, "b_dec")}
    return [_mismatch(name, shapes[name], shape) for name, shape in expected.items() if shapes[name] != shape]


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
