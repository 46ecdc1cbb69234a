"""A tiny world for whole extractions: a random Gemma 2 of odd sizes, its tokenizer, two SAEs and two datasets.

Nothing in it was trained: thresholds are put where a twentieth of the pre-activations lies above them, so that there
are firings, and what they mean is of no interest. It is built once per process, in a second.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from corpus_support import metaspace_transformers
from models_support import tiny_model

from actstore import maintenance

__all__ = ["ATTENTION_SAE", "RESIDUAL_SAE", "TinyWorld", "extract", "tiny_world"]

torch.set_num_threads(1)

HIDDEN, HEADS, HEAD_DIM = 32, 4, 10
CONTEXT, SHARD_ROWS, BATCH_TOKENS = 24, 64, 96
RESIDUAL_SAE, ATTENTION_SAE = "tiny-res", "tiny-att"
FIRING_SHARE = 0.05
WORDS = ("the", "cat", "on", "a", "hat", "then", "not", "that", "boat", "tea", "ace", "each", "coat", "note")
STRANGE = ("the 🐈‍⬛ on the 🪑", "a\0b then\0", "naïve café\n\tthe ☕", "", "é" * 7, "the cat " * 30)


@dataclass(frozen=True)
class TinyWorld:
    """Where everything lies; the SAEs as arguments of `--sae`."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "tiny-gemma"

    @property
    def dataset(self) -> Path:
        return self.folder / "texts.jsonl"

    @property
    def more(self) -> Path:
        """Other documents, to append."""
        return self.folder / "more.jsonl"

    @property
    def residual_sae(self) -> str:
        return f"{RESIDUAL_SAE}={self.folder / 'residual'}@resid_post.1"

    @property
    def attention_sae(self) -> str:
        return f"{ATTENTION_SAE}={self.folder / 'attention'}@z.0"


@cache
def tiny_world() -> TinyWorld:
    """Return the world, built on first use; it goes when the process ends."""
    world = TinyWorld(Path(_home().name))
    model = tiny_model(
        3,
        vocab_size=len(metaspace_transformers()),
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
    )
    model.save_pretrained(world.model)
    metaspace_transformers().save_pretrained(world.model)
    residual, attention = _inputs_of_saes(model)
    _write_sae(world.folder / "residual", residual, 300, seed=1)
    _write_sae(world.folder / "attention", attention, 200, seed=2)
    _write_texts(world.dataset, 7, seed=4, strange=STRANGE)
    _write_texts(world.more, 6, seed=5, strange=())
    return world


def extract(out: Path, world: TinyWorld | None = None, **changes: Any) -> Any:
    """Extract the world into a store as tests like it: six shards, most kinds of artifacts; return the outcome.

    A child process is given its parent's `world`: it would else build its own.
    """
    world = world or tiny_world()
    options: dict[str, Any] = {
        "model": str(world.model),
        "out": out,
        "dataset": str(world.dataset),
        "sites": ["resid_post.1"],
        "saes": [world.residual_sae],
        "lens_k": 3,
        "lens_sites": ["resid_post.0"],
        "context": CONTEXT,
        "shard_rows": SHARD_ROWS,
        "batch_tokens": BATCH_TOKENS,
        "device": "cpu",
        "allow_unhealthy": True,
    }
    return maintenance.extract_and_index(**(options | changes))


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tiny-world-")


def _write_texts(path: Path, n_texts: int, *, seed: int, strange: tuple[str, ...]) -> None:
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, size=random.integers(2, 9))) for _ in range(n_texts)]
    lines = [json.dumps({"text": text, "number": number}) for number, text in enumerate((*strange, *texts))]
    path.write_text("\n".join(lines) + "\n")


def _inputs_of_saes(model: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return rows of `resid_post.1` and `z.0` of random tokens: (row, width)."""
    kept: list[torch.Tensor] = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    tokens = torch.randint(4, model.config.vocab_size, (40, CONTEXT), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        states = model(tokens, use_cache=False, output_hidden_states=True).hidden_states
    hook.remove()
    return states[2].flatten(0, 1).numpy(), kept[0].flatten(0, 1).numpy()


def _write_sae(folder: Path, rows: npt.NDArray[np.float32], n_features: int, *, seed: int) -> None:
    random = np.random.default_rng(seed)
    decoder = random.normal(size=(n_features, rows.shape[1]))
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    thresholds = np.quantile(rows @ decoder.T, 1 - FIRING_SHARE, axis=0)
    arrays = {
        "W_enc": decoder.T,
        "W_dec": decoder,
        "b_enc": np.zeros(n_features),
        "b_dec": np.zeros(rows.shape[1]),
        "threshold": np.maximum(thresholds, 1e-3),
    }
    folder.mkdir()
    np.savez(folder / "params.npz", allow_pickle=True, **{key: one.astype(np.float32) for key, one in arrays.items()})
