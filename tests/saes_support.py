"""Sparse coders written as Gemma Scope writes them, without the code under test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]

INNER = "layer_3/width_48/average_l0_12"


def random_arrays(d_in: int = 10, d_sae: int = 48, seed: int = 0) -> Arrays:
    """Return the five arrays, with decoder rows of norm 1 and thresholds that some rows reach."""
    random = np.random.default_rng(seed)
    w_dec = random.normal(size=(d_sae, d_in))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    arrays = {
        "W_enc": random.normal(size=(d_in, d_sae)),
        "W_dec": w_dec,
        "b_enc": random.normal(size=d_sae) / 4,
        "b_dec": random.normal(size=d_in) / 4,
        "threshold": random.uniform(0.5, 3.0, size=d_sae),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def write_sae(root: Path, inner: str = INNER, arrays: Arrays | None = None, *, release: str = "tiny-scope-res") -> Path:
    """Write `params.npz` below root/release/inner and return its folder."""
    folder = root / release / inner
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", allow_pickle=True, **(random_arrays() if arrays is None else arrays))
    return folder
