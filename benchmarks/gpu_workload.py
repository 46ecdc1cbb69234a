"""What benchmarks/gpu.py runs on, made where it runs: a random model of a real shape, documents, SAEs, and the disk."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from actstore.blocks import TokenShard
from actstore.corpus import load_tokenizer
from actstore.demo import assets
from actstore.extraction.batches import plan_batches
from actstore.models import LoadedModel
from actstore.sites import Site
from actstore.store import StoreReader

__all__ = [
    "SHAPES",
    "Shape",
    "batches_of",
    "disk_bytes_per_second",
    "documents",
    "first_rows",
    "make_model",
    "sae_files",
]

L0 = 80
CALIBRATION_ROWS = 2048
BLOCK_BYTES = 1 << 24
BESIDE = 1.001  # a threshold that is the very value of a row (BOS is in every sequence) is one that float32 cannot tell


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, of its SAEs and of the text."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocabulary_size: int
    d_sae: int
    context: int
    shard_rows: int
    n_tokens: int
    disk_bytes: int  # written to measure the disk

    @property
    def middle(self) -> int:
        """The layer of what is measured at one layer."""
        return self.n_layers // 2


SHAPES = {
    "gemma-2-2b": Shape(26, 2304, 8, 4, 256, 9216, 256_000, 16_384, 1024, 16_384, 98_304, 4 << 30),
    "small": Shape(3, 64, 4, 2, 16, 128, 8192, 512, 128, 512, 1200, 16 << 20),
}


def make_model(shape: Shape, device: torch.device) -> Gemma2ForCausalLM:
    """Return a random Gemma-2 in bfloat16, made on the device."""
    config = Gemma2Config(
        vocab_size=shape.vocabulary_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.d_head,
        query_pre_attn_scalar=shape.d_head,
        max_position_embeddings=8192,
        sliding_window=4096,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return Gemma2ForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(usual)


def documents(shape: Shape, n_tokens: int) -> list[str]:
    """Return seeded documents of ragged length, a sixteenth of the context to all of it, `n_tokens` or more together.

    Their words are the embedded dataset's, and so are the token ids: all below its tokenizer's 8,192.
    """
    random = np.random.default_rng(0)
    words = " ".join(document["text"] for document in assets().documents()).split()
    tokenizer = load_tokenizer(assets().model)
    found, n_found = [], 0
    while n_found < n_tokens:
        length = int(random.integers(shape.context // 16, shape.context))
        start = int(random.integers(0, len(words)))
        text = " ".join(words[(start + place) % len(words)] for place in range(length))
        found.append(text)
        n_found += min(shape.context, len(tokenizer.encode([text]).ids) + 1)
    return found


def batches_of(store: Path, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return token ids and mask of every batch that extraction runs: sorted by length within a shard."""
    reader = StoreReader(store)
    shards = (TokenShard(shard, reader.tokens(shard)) for shard in range(reader.layout.n_shards))
    batches = (batch for shard in shards for batch in plan_batches(shard, reader.store.batch_tokens))
    return [
        (torch.from_numpy(batch.token_ids).to(device), torch.from_numpy(batch.attention_mask).to(device))
        for batch in batches
    ]


def first_rows(model: LoadedModel, batch: tuple[torch.Tensor, torch.Tensor], layer: int) -> torch.Tensor:
    """Return the residual stream behind a layer, of the real tokens of one batch: (row, d_model)."""
    token_ids, mask = batch
    found: list[torch.Tensor] = []
    model.capture(token_ids, mask, [Site("resid_post", layer)], lambda _, values: found.append(values[mask.bool()]))
    return found[0]


def sae_files(
    home: Path, shape: Shape, model: LoadedModel, batch: tuple[torch.Tensor, torch.Tensor]
) -> Iterator[tuple[int, str]]:
    """Write a random JumpReLU SAE for each layer in Gemma Scope's layout; yield the layer and the SAE's argument.

    All have the same directions, and each its own thresholds: about `L0` features of a row fire.
    """
    generator = torch.Generator().manual_seed(1)
    w_dec = torch.nn.functional.normalize(torch.randn(shape.d_sae, shape.d_model, generator=generator), dim=1)
    w_enc = w_dec.T.contiguous()
    on_device = w_enc.to(model.device)
    for layer in range(shape.n_layers):
        rows = first_rows(model, batch, layer)[:CALIBRATION_ROWS].float()
        n_fire = max(1, round(len(rows) * L0 / shape.d_sae))
        threshold = (rows @ on_device).topk(n_fire, dim=0).values[-1].clamp(min=1e-3) * BESIDE
        folder = home / f"layer_{layer}" / f"width_{shape.d_sae}" / f"average_l0_{L0}"
        folder.mkdir(parents=True)
        np.savez(
            folder / "params.npz",
            W_enc=w_enc.numpy(),
            W_dec=w_dec.numpy(),
            b_enc=np.zeros(shape.d_sae, np.float32),
            b_dec=np.zeros(shape.d_model, np.float32),
            threshold=threshold.cpu().numpy(),
        )
        yield layer, f"{layer}-random={folder}@resid_post.{layer}"


def disk_bytes_per_second(home: Path, n_bytes: int) -> float:
    """Return how fast random bytes are written and made durable, in one stream."""
    block = np.random.default_rng(0).bytes(BLOCK_BYTES)
    path = home / "written"
    started = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(n_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return n_bytes / seconds
