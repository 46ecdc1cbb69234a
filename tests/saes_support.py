"""Sparse coders written as their makers write them, without the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

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


def plain_tensors(d_in: int = 10, d_sae: int = 48, seed: int = 0) -> Arrays:
    """Return encoder, decoder and biases with decoder rows of different norms, as most formats hold them."""
    random = np.random.default_rng(seed)
    arrays = {
        "W_enc": random.normal(size=(d_in, d_sae)),
        "W_dec": random.normal(size=(d_sae, d_in)) * random.uniform(0.5, 2.0, size=(d_sae, 1)),
        "b_enc": random.normal(size=d_sae) / 4,
        "b_dec": random.normal(size=d_in) / 4,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def write_safetensors(folder: Path, weights: str, arrays: Arrays, config: str, body: dict[str, Any]) -> Path:
    """Write a file of weights and a configuration into a folder, and return the folder."""
    (folder / weights).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / weights)
    (folder / config).write_text(json.dumps(body))
    return folder


SAELENS = {
    "d_in": 10,
    "d_sae": 48,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_pre", "sae_lens_version": "6.1.0"},
}


def write_saelens(root: Path, arrays: Arrays, **changes: Any) -> Path:
    """Write a folder as SAELens does; a change to None takes the key away."""
    body = {name: value for name, value in (SAELENS | changes).items() if value is not None}
    return write_safetensors(root / "sae", "sae_weights.safetensors", arrays, "cfg.json", body)


SPARSIFY = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": 48,
    "k": 5,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": 10,
}


def write_sparsify(root: Path, hookpoint: str = "layers.3", **changes: Any) -> tuple[Path, Arrays]:
    """Write a folder as sparsify does, and return it with its tensors."""
    plain = plain_tensors()
    plain["W_dec"] /= np.linalg.norm(plain["W_dec"], axis=1, keepdims=True)
    arrays = {
        "encoder.weight": plain["W_enc"].T,
        "encoder.bias": plain["b_enc"],
        "W_dec": plain["W_dec"],
        "b_dec": plain["b_dec"],
    }
    return write_safetensors(root / hookpoint, "sae.safetensors", arrays, "cfg.json", SPARSIFY | changes), arrays


GEMMA_SCOPE_2 = {
    "hf_hook_point_in": "model.layers.13.output",
    "hf_hook_point_out": "model.layers.13.output",
    "width": 48,
    "model_name": "google/gemma-3-1b-pt",
    "architecture": "jump_relu",
    "l0": 12,
    "affine_connection": False,
    "type": "sae",
}


def write_gemma_scope_2(root: Path, arrays: Arrays | None = None, **changes: Any) -> Path:
    """Write a folder as Gemma Scope 2 has them."""
    arrays = {name.lower(): array for name, array in (arrays or random_arrays()).items()}
    folder = root / "resid_post" / "layer_13_width_48_l0_small"
    return write_safetensors(folder, "params.safetensors", arrays, "config.json", GEMMA_SCOPE_2 | changes)


LLAMA_SCOPE = {
    "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post",
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.75,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 8.5, "out": 8.5},
    "apply_decoder_bias_to_pre_encoder": False,
    "sparsity_include_decoder_norm": True,
    "d_model": 10,
    "d_sae": 48,
    "top_k": 20,
}


def write_llama_scope(root: Path, name: str = "Llama3_1-8B-Base-L15R-8x", **changes: Any) -> tuple[Path, Arrays]:
    """Write a folder as Llama Scope has them, and return it with its tensors."""
    plain = plain_tensors()
    arrays = {
        "encoder.weight": plain["W_enc"].T,
        "encoder.bias": plain["b_enc"],
        "decoder.weight": plain["W_dec"].T,
        "decoder.bias": plain["b_dec"],
    }
    weights = "checkpoints/final.safetensors"
    return write_safetensors(root / name, weights, arrays, "hyperparams.json", LLAMA_SCOPE | changes), arrays
