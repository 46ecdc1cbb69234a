"""A JumpReLU sparse coder as plain arrays, whatever file it came from.

    pre = x @ w_enc + b_enc      f = pre where pre > threshold, else 0      x_hat = f @ w_dec + b_dec

x is the raw activation: nothing is subtracted or normalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore.errors import InvalidInput, explain
from actstore.recipe import SaeIdentity

__all__ = ["ARRAYS", "SparseCoder", "check_width", "shape_faults", "value_faults"]

ARRAYS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class SparseCoder:
    """One sparse coder, float32: w_enc (d_in, d_sae), w_dec (d_sae, d_in), b_enc, threshold (d_sae), b_dec (d_in)."""

    identity: SaeIdentity
    w_enc: Array
    w_dec: Array
    b_enc: Array
    b_dec: Array
    threshold: Array

    def __post_init__(self) -> None:
        if faults := shape_faults({name: getattr(self, name).shape for name in ARRAYS}):
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
    """Return how the arrays' shapes disagree, given all of `ARRAYS`; the biases say what the matrices must be."""
    faults = [f"{name} is {shapes[name]}, not a vector" for name in ("b_enc", "b_dec") if len(shapes[name]) != 1]
    if faults:
        return faults
    d_sae, d_in = shapes["b_enc"][0], shapes["b_dec"][0]
    if not d_sae or not d_in:
        return [f"it has {d_sae} features of width {d_in}"]
    expected = {"w_enc": (d_in, d_sae), "w_dec": (d_sae, d_in), "threshold": (d_sae,)}
    return [_mismatch(name, shapes[name], shape) for name, shape in expected.items() if shapes[name] != shape]


def _mismatch(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    transposed = " (it is transposed)" if len(found) == 2 and found == expected[::-1] else ""
    return f"{name} is {found}{transposed}, where b_enc and b_dec ask for {expected}"


def value_faults(arrays: Mapping[str, Array]) -> list[str]:
    """Return which arrays hold NaN or infinity, or thresholds that are not positive, given all of `ARRAYS`."""
    # The extremes carry any NaN or infinity, and need no second array of the size of the weights.
    faults = [f"{name} has NaN or infinity" for name in ARRAYS if not np.isfinite([*_extremes(arrays[name])]).all()]
    n_below = int(np.count_nonzero(arrays["threshold"] <= 0))
    return [*faults, f"{n_below} thresholds are not positive"] if n_below else faults


def _extremes(array: Array) -> tuple[np.float32, np.float32]:
    return np.min(array), np.max(array)
