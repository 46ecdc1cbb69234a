"""Transcoders of every format, written from its published description, with their equations in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from saes_support import (
    GEMMA_SCOPE_2,
    LLAMA_SCOPE,
    SPARSIFY,
    Arrays,
    write_saelens,
    write_safetensors,
)

from actstore.saes import (
    SparseCoder,
    expand_sae_arguments,
    load_sae,
)

torch.set_num_threads(1)

D_IN, D_OUT, D_SAE = 10, 14, 48
Matrix = npt.NDArray[np.float64]


def rows(width: int, seed: int) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=(64, width)) * 2 + 0.5).astype(np.float32)


ROWS = rows(D_IN, 5)


def transcoder_arrays(d_in: int = D_IN, d_out: int = D_OUT, seed: int = 0) -> Arrays:
    """Return the arrays of a transcoder and its skip, (d_in, d_out)."""
    random = np.random.default_rng(seed)
    arrays = {
        "W_enc": random.normal(size=(d_in, D_SAE)),
        "W_dec": random.normal(size=(D_SAE, d_out)),
        "b_enc": random.normal(size=D_SAE) / 4,
        "b_dec": random.normal(size=d_out) / 4,
        "threshold": random.uniform(0.5, 3.0, size=D_SAE),
        "skip": random.normal(size=(d_in, d_out)) / 4,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@dataclass(frozen=True)
class Case:
    """An argument, the coder that it should be, and the equation in float64."""

    argument: str
    read: str
    write: str
    features: Matrix
    decoded: Matrix
    architecture: str


def relu(x: Matrix) -> Matrix:
    return np.maximum(x, 0)


def jump(pre: Matrix, threshold: Any) -> Matrix:
    return np.where(pre > threshold, pre, 0.0)


def doubles(arrays: Arrays) -> dict[str, Matrix]:
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def gemma_scope(root: Path) -> Case:
    arrays = transcoder_arrays()
    folder = root / "google" / "gemma-scope-2b-pt-transcoders" / "layer_5" / "width_48" / "average_l0_12"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", allow_pickle=True, **{name: arrays[name] for name in arrays if name != "skip"})
    a = doubles(arrays)
    f = jump(ROWS @ a["W_enc"] + a["b_enc"], a["threshold"])
    return Case(str(folder), "ln2_normalized.5", "mlp_out.5", f, f @ a["W_dec"] + a["b_dec"], "jumprelu")


SECOND: dict[str, Any] = GEMMA_SCOPE_2 | {
    "hf_hook_point_in": "model.layers.13.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.13.post_feedforward_layernorm.output",
    "affine_connection": True,
    "type": "transcoder",
}


def write_second(root: Path, *, name: str = "layer_13_width_48_l0_small_affine", **changes: Any) -> tuple[Path, Arrays]:
    """Write a transcoder as Gemma Scope 2 has them; a change to None takes the key away."""
    arrays = transcoder_arrays()
    tensors = {key.lower(): arrays[key] for key in arrays if key != "skip"}
    if changes.pop("skip", True):
        tensors["affine_skip_connection"] = arrays["skip"]
    body = {key: value for key, value in (SECOND | changes).items() if value is not None}
    folder = root / "transcoder" / name
    return write_safetensors(folder, "params.safetensors", tensors, "config.json", body), arrays


def gemma_scope_2(root: Path) -> Case:
    folder, arrays = write_second(root)
    a = doubles(arrays)
    f = jump(ROWS @ a["W_enc"] + a["b_enc"], a["threshold"])
    decoded = f @ a["W_dec"] + a["b_dec"] + ROWS @ a["skip"]
    return Case(str(folder), "ln2.13", "mlp_out.13", f, decoded, "jumprelu skip")


HOOKS = {
    "hook_name": "blocks.3.hook_mlp_in",
    "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output",
    "hook_name_out": "blocks.3.hook_mlp_out",
    "hf_hook_name_out": "model.layers.3.post_feedforward_layernorm.output",
}


def write_saelens_transcoder(root: Path, architecture: str, hooks: Any = HOOKS, **changes: Any) -> tuple[Path, Arrays]:
    """Write a transcoder as SAELens does; a hook of None is left out."""
    arrays = transcoder_arrays()
    tensors = {name: arrays[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    if "skip" in architecture:
        tensors["W_skip"] = arrays["skip"].T
    if "jumprelu" in architecture:
        tensors["threshold"] = arrays["threshold"]
    metadata = {"model_name": "gemma-3-1b"} | {name: hook for name, hook in hooks.items() if hook}
    options = {"architecture": architecture, "d_out": D_OUT, "apply_b_dec_to_input": False, "metadata": metadata}
    return write_saelens(root, tensors, **(options | changes)), arrays


def saelens(architecture: str) -> Any:
    def case(root: Path) -> Case:
        folder, arrays = write_saelens_transcoder(root, architecture)
        a = doubles(arrays)
        pre = ROWS @ a["W_enc"] + a["b_enc"]
        f = jump(pre, a["threshold"]) if "jumprelu" in architecture else relu(pre)
        decoded = f @ a["W_dec"] + a["b_dec"] + (ROWS @ a["skip"] if "skip" in architecture else 0)
        return Case(str(folder), "ln2.3", "mlp_out.3", f, decoded, architecture)

    return case


def sparsify(module: str, read: str, write: str) -> Any:
    def case(root: Path) -> Case:
        arrays = transcoder_arrays(D_IN, D_IN)
        tensors = {
            "encoder.weight": arrays["W_enc"].T,
            "encoder.bias": arrays["b_enc"],
            "W_dec": arrays["W_dec"],
            "b_dec": arrays["b_dec"],
            "W_skip": arrays["skip"].T,
        }
        body = SPARSIFY | {"transcode": True, "skip_connection": True, "k": 5}
        folder = write_safetensors(root / module, "sae.safetensors", tensors, "cfg.json", body)
        a = doubles(arrays)
        pre = relu(ROWS @ a["W_enc"] + a["b_enc"])  # b_dec is of the output and not subtracted
        f = np.where(pre >= np.sort(pre, axis=1)[:, -5:-4], pre, 0)
        decoded = f @ a["W_dec"] + a["b_dec"] + ROWS @ a["skip"]
        return Case(str(folder), read, write, f, decoded, "topk k=5 skip")

    return case


TC_HOOKS = {"hook_point_in": "blocks.15.ln2.hook_normalized", "hook_point_out": "blocks.15.hook_mlp_out"}


def write_llama_transcoder(root: Path, name: str = "Llama3_1-8B-Base-L15TC-8x", **changes: Any) -> tuple[Path, Arrays]:
    arrays = transcoder_arrays(D_IN, D_IN)
    tensors = {
        "encoder.weight": arrays["W_enc"].T,
        "encoder.bias": arrays["b_enc"],
        "decoder.weight": arrays["W_dec"].T,
        "decoder.bias": arrays["b_dec"],
    }
    norms = {"dataset_average_activation_norm": {"in": 3.1, "out": 0.7}}
    body = {key: value for key, value in (LLAMA_SCOPE | TC_HOOKS | norms | changes).items() if value is not None}
    weights = "checkpoints/final.safetensors"
    return write_safetensors(root / name, weights, tensors, "hyperparams.json", body), arrays


def llama_scope(root: Path) -> Case:
    """Trained on rows of norm √d: x · s_in is encoded, and what is decoded is y · s_out."""
    folder, arrays = write_llama_transcoder(root)
    a = doubles(arrays)
    s_in, s_out = np.sqrt(D_IN) / 3.1, np.sqrt(D_IN) / 0.7
    norm = np.linalg.norm(a["W_dec"] * s_in / s_out, axis=1)
    f = jump((ROWS @ a["W_enc"] + a["b_enc"] / s_in) * norm, 0.75)
    decoded = f @ (a["W_dec"] * s_in / s_out / norm[:, None]) + a["b_dec"] / s_out
    return Case(str(folder), "ln2_normalized.15", "mlp_out.15", f, decoded, "jumprelu threshold=0.75")


CASES = {
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    **{
        f"saelens_{name}": saelens(name)
        for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
    },
    "sparsify_mlp": sparsify("layers.7.mlp", "ln2.7", "mlp_out_raw.7"),
    "sparsify_layer": sparsify("layers.7", "resid_pre.7", "resid_post.7"),
    "sparsify_gpt2": sparsify("h.7.mlp", "ln2.7", "mlp_out_raw.7"),
    "llama_scope": llama_scope,
}


def load(argument: str | Path) -> SparseCoder:
    return load_sae(expand_sae_arguments([str(argument)])[0])


def unnamed(root: Path, arrays: Arrays) -> Path:
    """Write a `params.npz` into a folder whose name says nothing."""
    root.mkdir(parents=True, exist_ok=True)
    np.savez(root / "params.npz", allow_pickle=True, **{name: arrays[name] for name in arrays if name != "skip"})
    return root
