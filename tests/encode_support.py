"""Stored sites of the tiny world, coders that they are encoded with, and encoding in processes of its own."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Sequence
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from process_support import _watch_operations, processes
from saes_support import SPARSIFY, write_safetensors
from store_support import home
from tiny_world import HIDDEN, extract, tiny_world
from transcoder_support import transcoder_arrays, unnamed

import actstore
from actstore.store import StoreReader

__all__ = [
    "CODERS",
    "NO_LENS",
    "SITES",
    "TOP",
    "Health",
    "coders",
    "copy_of_sites",
    "encode",
    "health",
    "start_encoding",
    "store_of_sites",
    "stored",
]

SITES = ["resid_post.1", "z.0", "ln2.1", "mlp_out.1", "mlp_act.1"]
CODERS = ("tiny-res", "tiny-att", "top", "tc", "1-neurons-mlp_act")
TOP = 5
NO_LENS: dict[str, Any] = {"lens_k": 0, "lens_sites": []}
Health = dict[tuple[str, str], dict[str, Any]]


def stored(out: Path, **changes: Any) -> Path:
    """Extract sites and nothing else."""
    extract(out, **({"sites": SITES, "saes": []} | NO_LENS | changes))
    return out


@cache
def store_of_sites() -> Path:
    """Return a store of sites alone that nobody may change; it goes when the process ends."""
    return stored(home() / "sites.act")


def copy_of_sites(folder: Path) -> Path:
    """Return a copy of the store of sites alone, to be changed."""
    return Path(shutil.copytree(store_of_sites(), folder / "copy.act"))


def health(store: Path) -> Health:
    return {(row["name"], row["subject"]): row for row in StoreReader(store).tables()["health"]}


@cache
def coders() -> tuple[str, ...]:
    """Return JumpReLU coders of two sites, a TopK one, a transcoder and neurons, as arguments."""
    world = tiny_world()
    random = np.random.default_rng(3)
    tensors = {
        "encoder.weight": random.normal(size=(64, HIDDEN)),
        "encoder.bias": random.normal(size=64) / 4,
        "W_dec": random.normal(size=(64, HIDDEN)),
        "b_dec": random.normal(size=HIDDEN) / 4,
    }
    body = SPARSIFY | {"d_in": HIDDEN, "num_latents": 64, "k": TOP}
    floats = {name: array.astype(np.float32) for name, array in tensors.items()}
    top = write_safetensors(world.folder / "layers.1", "sae.safetensors", floats, "cfg.json", body)
    transcoder = unnamed(world.folder / "transcoder", transcoder_arrays(HIDDEN, HIDDEN))
    neurons = "neurons:mlp_act.1"
    return world.residual_sae, world.attention_sae, f"top={top}", f"tc={transcoder}@ln2.1>mlp_out.1", neurons


def encode(store: Path, saes: Sequence[str] = (), **changes: Any) -> Any:
    """Encode as tests like it: with all coders, on the CPU, healthy or not; the index is asked for where it matters."""
    options: dict[str, Any] = {"device": "cpu", "neurons_top": TOP, "allow_unhealthy": True, "with_index": False}
    return actstore.encode(store, list(saes or coders()), **(options | changes))


def start_encoding(store: Path, saes: Sequence[str], *, dies_at: int | None = None) -> BaseProcess:
    """Start encoding in a process; it kills itself before its operation on the file system number `dies_at`."""
    process = processes().Process(target=_encode, args=(store, list(saes), dies_at))
    process.start()
    return process


def _encode(store: Path, saes: list[str], dies_at: int | None) -> None:
    if dies_at is not None:
        _watch_operations(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == dies_at else None)
    encode(store, saes)
