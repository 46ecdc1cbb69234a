"""Tuned lenses as they are published, and a model's log-probabilities of residual rows by numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extraction_support import log_softmax
from safetensors.numpy import save_file

from actstore.lenses.tuned import unembed_hash
from actstore.store import StoreReader

D_MODEL, N_LAYERS, DOC = 128, 6, 7
FITTED = [("resid_pre.0", 0), *((f"resid_post.{layer}", layer + 1) for layer in range(N_LAYERS - 1))]


def kit(reader: StoreReader) -> Any:
    return reader.kit_piece(reader.kit_digest("unembedding", "sites/resid_post.5"))


def numpy_logprobs(piece: Any, rows: np.ndarray) -> np.ndarray:
    """Return the model's log-probabilities of residual rows, from the page docs/format.md: (row, token)."""
    exact = rows.astype(np.float64)
    normed = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + piece.attrs["norm_epsilon"])
    raw = normed * piece["gain"][:] @ piece["weight"][:].astype(np.float64).T
    return log_softmax(30 * np.tanh(raw / 30))


def arrays_of(seed: int = 0, n_layers: int = N_LAYERS, d_model: int = D_MODEL) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for number in range(n_layers):
        arrays[f"{number}.weight"] = (random.normal(size=(d_model, d_model)) * 0.05).astype(np.float32)
        arrays[f"{number}.bias"] = random.normal(size=d_model).astype(np.float32)
    return arrays


def published(
    folder: Path, piece: Any = None, arrays: dict[str, np.ndarray] | None = None, *, pt: bool = False, **changes: Any
) -> Path:
    """Write a folder as the published lenses are, and return it; changes are those of its configuration."""
    config = {
        "base_model_name_or_path": "model",
        "d_model": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "bias": True,
        "base_model_revision": "main",
        "unembed_hash": None if piece is None else unembed_hash(piece["weight"]),
        "lens_type": "linear_tuned_lens",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    arrays = arrays_of() if arrays is None else arrays
    if pt:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / "params.pt")
    else:
        save_file(arrays, folder / "params.safetensors")
    return folder
