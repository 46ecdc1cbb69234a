"""Extraction against the limit of its parts: the bare forward pass and the bare encoder over the same batches.

python benchmarks/overlap.py [--tokens 40000] [--threads 1]

The workload is seeded: a random Gemma-2 of 8 layers x 512, ragged documents of 16 to 256 tokens, a 16,384-wide
JumpReLU SAE with about 80 firings a row. Prints each kind of extraction beside what its parts take alone in the same
run, the floor that it must reach and the aim.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload
from transformers import Gemma2Config, Gemma2ForCausalLM

import actstore
from actstore.blocks import TokenShard
from actstore.corpus import load_tokenizer
from actstore.demo import assets
from actstore.extraction.batches import plan_batches
from actstore.models import LoadedModel, load_model
from actstore.saes import SaeEncoder, expand_sae_arguments, load_sae
from actstore.sites import Site
from actstore.store import StoreReader

N_LAYERS, D_MODEL, D_SAE, L0, MIDDLE = 8, 512, 16_384, 80, 4
TILE_ROWS = 1024


def seeded_model() -> Gemma2ForCausalLM:
    """Return a random model of the benchmark's shape, float32."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=8192,
        hidden_size=D_MODEL,
        intermediate_size=2048,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        query_pre_attn_scalar=64,
        sliding_window=128,
        max_position_embeddings=1024,
    )
    return Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()


def ragged_documents(n_tokens: int) -> list[str]:
    """Return seeded documents of 16 to 256 tokens in random order, about `n_tokens` together."""
    random = np.random.default_rng(0)
    words = " ".join(document["text"] for document in assets().documents()).split()
    lengths = random.integers(16, 256, size=max(1, n_tokens // 136))
    starts = random.integers(0, len(words) - 256, size=len(lengths))
    return [" ".join(words[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def write_sae(folder: Path, model: LoadedModel, documents: list[str]) -> Path:
    """Write a random SAE in Gemma Scope's layout whose thresholds let about `L0` features of a row fire."""
    tokenizer = load_tokenizer(assets().model)
    ids = torch.from_numpy(tokenizer.encode(documents[:64]).ids[:2048].astype(np.int64)).reshape(-1, 64)
    rows: list[torch.Tensor] = []
    model.capture(
        ids,
        torch.ones_like(ids),
        [Site("resid_post", MIDDLE)],
        lambda _, values: rows.append(values.reshape(-1, D_MODEL)),
    )
    generator = torch.Generator().manual_seed(1)
    w_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=1)
    before = rows[0] @ w_dec.T
    threshold = before.quantile(1 - L0 / D_SAE, dim=0).clamp(min=1e-3)
    folder.mkdir(parents=True)
    np.savez(
        folder / "params.npz",
        W_enc=w_dec.T.numpy(),
        W_dec=w_dec.numpy(),
        b_enc=np.zeros(D_SAE, np.float32),
        b_dec=np.zeros(D_MODEL, np.float32),
        threshold=threshold.numpy(),
    )
    return folder


@dataclass(frozen=True)
class Alone:
    """Seconds that the parts of an extraction take alone, over the batches and tiles of one store."""

    forward: float  # all layers, no head, batches sorted by length
    forward_to_middle: float
    padded_in_order: float  # as many sequences a batch, in the dataset's order
    encode: float


def alone(store: Path, model: LoadedModel, sae: Path) -> Alone:
    reader = StoreReader(store)
    shards = [TokenShard(shard, reader.tokens(shard)) for shard in range(reader.layout.n_shards)]
    batches = [batch for shard in shards for batch in plan_batches(shard, reader.store.batch_tokens)]
    pairs = [(torch.from_numpy(batch.token_ids), torch.from_numpy(batch.attention_mask)) for batch in batches]
    encoder = SaeEncoder(load_sae(expand_sae_arguments([f"{sae}@resid_post.{MIDDLE}"])[0]), "cpu")
    n_tiles = -(-reader.layout.n_rows // TILE_ROWS)
    rows = torch.randn(TILE_ROWS, D_MODEL, generator=torch.Generator().manual_seed(2))
    return Alone(
        forward=seconds(lambda: forward(model, pairs, N_LAYERS - 1)),
        forward_to_middle=seconds(lambda: forward(model, pairs, MIDDLE)),
        padded_in_order=seconds(lambda: forward(model, in_order(shards), N_LAYERS - 1)),
        encode=seconds(lambda: [encoder.encode(rows) for _ in range(n_tiles)]),
    )


def forward(model: LoadedModel, pairs: list[tuple[torch.Tensor, torch.Tensor]], layer: int) -> None:
    """Run batches up to a layer and throw away what is found."""
    for token_ids, mask in pairs:
        model.capture(token_ids, mask, [Site("resid_post", layer)], lambda _site, _values: None)


def in_order(shards: list[TokenShard]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of 32 sequences in the dataset's order, each padded to its longest."""
    pairs = []
    for shard in shards:
        ids, seq = shard.column("token_id")[: shard.n_rows], shard.column("seq")[: shard.n_rows]
        texts = [torch.from_numpy(one.astype(np.int64)) for one in np.split(ids, np.flatnonzero(np.diff(seq)) + 1)]
        for first in range(0, len(texts), 32):
            batch = texts[first : first + 32]
            padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            lengths = torch.tensor([len(one) for one in batch])
            pairs.append((padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long()))
    return pairs


def seconds(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def extracted(
    home: Path, name: str, model: Gemma2ForCausalLM, documents: list[str], **asked: Any
) -> tuple[Path, float]:
    """Return the store of one kind of extraction, and the seconds of its loop."""
    outcome = actstore.extract(
        model,
        documents,
        tokenizer=str(assets().model),
        out=home / name,
        context=256,
        device="cpu",
        predictions=False,
        allow_unhealthy=True,
        with_index=False,
        **asked,
    )
    return home / name, outcome.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(f"machine: {workload.machine()}, {torch.get_num_threads()} threads of torch")
    documents, causal_lm = ragged_documents(asked.tokens), seeded_model()
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        model = load_model(causal_lm)
        sae = write_sae(home / "sae" / "average_l0_80", model, documents)
        for number in range(asked.rounds):
            print_round(home / str(number), causal_lm, model, documents, sae)
    print(f"peak resident memory of the whole run: {workload.peak_memory_mb():.0f} MB")


def print_round(home: Path, causal_lm: Gemma2ForCausalLM, model: LoadedModel, documents: list[str], sae: Path) -> None:
    home.mkdir()
    source = f"{sae}@resid_post.{MIDDLE}"
    store, dense = extracted(home, "dense", causal_lm, documents, sites=["resid_post.*"])
    parts = alone(store, model, sae)
    _, both = extracted(home, "both", causal_lm, documents, sites=["resid_post.*"], saes=[source])
    _, sparse = extracted(home, "sparse", causal_lm, documents, saes=[source])
    lines = [
        ("dense 8 layers / bare forward", parts.forward / dense, 0.93, 0.97),
        ("dense + SAE / (bare forward + encode)", (parts.forward + parts.encode) / both, 0.93, 0.97),
        ("SAE alone / (bare to its layer + encode)", (parts.forward_to_middle + parts.encode) / sparse, 0.93, 0.97),
        ("ragged documents / dataset-order padding", parts.padded_in_order / parts.forward, 2.0, 2.2),
    ]
    for name, measured, floor, aim in lines:
        print(f"{name:<45} {measured:6.2f}   floor {floor}  aim {aim}", flush=True)


if __name__ == "__main__":
    main()
