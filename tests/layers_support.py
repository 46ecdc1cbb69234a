"""Coders of several layers, written as their makers write them, and their sum in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from saes_support import Arrays
from safetensors.numpy import save_file

from actstore.saes import (
    SparseCoder,
    expand_sae_arguments,
    load_sae,
)

torch.set_num_threads(1)

WIDTH, D_SAE, N_LAYERS = 10, 32, 3
CLT, CROSSCODER = "clt/width_96_l0_small", "crosscoder/layer_1_2_5_width_96_l0_big"
Matrix = npt.NDArray[np.float64]


def layer_arrays(position: int, *, skip: bool = False, n_layers: int = N_LAYERS) -> Arrays:
    """Return one layer's tensors as its makers write them: it writes nothing below itself."""
    random = np.random.default_rng(position)
    w_dec = random.normal(size=(D_SAE, n_layers, WIDTH))
    w_dec[:, :position] = 0
    arrays = {
        "w_enc": random.normal(size=(WIDTH, D_SAE)),
        "w_dec": w_dec,
        "b_enc": random.normal(size=D_SAE) / 4,
        "b_dec": random.normal(size=WIDTH),
        "threshold": random.uniform(0.5, 3.0, size=D_SAE),
    }
    if skip:
        arrays["affine_skip_connection"] = random.normal(size=(WIDTH, WIDTH)) / 4
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}


def write_layer(root: Path, inner: str, position: int, arrays: Arrays) -> Path:
    folder = root / inner
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / f"params_layer_{position}.safetensors")
    return folder


def write_coder(root: Path, inner: str, *, skip: bool = False) -> Path:
    """Write all layers and return their folder."""
    for position in range(N_LAYERS):
        folder = write_layer(root, inner, position, layer_arrays(position, skip=skip))
    return folder


def load(folder: Path) -> list[SparseCoder]:
    return [load_sae(one) for one in expand_sae_arguments([str(folder)])]


def rows_of(position: int, n_rows: int = 1100) -> npt.NDArray[np.float32]:
    return np.random.default_rng(100 + position).normal(size=(n_rows, WIDTH)).astype(np.float32)


def features_of(arrays: Arrays, rows: Matrix) -> Matrix:
    pre = rows @ arrays["w_enc"].astype(np.float64) + arrays["b_enc"]
    return np.where(pre > arrays["threshold"], pre, 0.0)


def equation(all_arrays: list[Arrays], all_rows: list[Matrix], layer: int) -> Matrix:
    """x_hat[l]: what every layer up to l writes there, the bias once, the skip of the layer's own row."""
    own = all_arrays[layer]
    total = np.zeros((len(all_rows[0]), own["b_dec"].size)) + own["b_dec"]
    for position in range(layer + 1):
        decoder = all_arrays[position]["w_dec"][:, layer].astype(np.float64)
        total += features_of(all_arrays[position], all_rows[position]) @ decoder
    if "affine_skip_connection" in own:
        total += all_rows[layer] @ own["affine_skip_connection"].astype(np.float64)
    return np.asarray(total)
