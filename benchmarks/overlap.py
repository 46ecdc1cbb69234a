"""Extraction against the limit of its parts: the bare forward pass and the bare encoder over the same batches.

python benchmarks/overlap.py [--tokens 12000] [--threads 1] [--evenly]

The workload is seeded: a random Gemma-2 of 8 layers x 512, ragged documents of 16 to 256 tokens, a 16,384-wide
JumpReLU SAE with about 80 firings a row. Each kind of extraction is put beside what its parts take alone in the same
run: a forward pass that ends behind the layer and keeps nothing, and an encoder written by hand that finds the firings
and nothing else. What both are measured for lies before and after the extraction; of several rounds the median counts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload
from measures import Measure, show
from transformers import Gemma2Config, Gemma2ForCausalLM

import actstore
from actstore.blocks import TokenShard
from actstore.corpus import load_tokenizer
from actstore.demo import assets
from actstore.extraction.batches import plan_batches
from actstore.extraction.memory import keep_freed_memory
from actstore.extraction.request import DEFAULT_SHARD_ROWS
from actstore.models import LoadedModel, load_model
from actstore.sites import Site
from actstore.store import StoreReader

N_LAYERS, D_MODEL, D_SAE, L0, MIDDLE = 8, 512, 16_384, 80, 3  # the SAE stops the forward pass after half the layers
TILE_ROWS = 1024
SHORTEST, LONGEST = 16, 256
SHARD_ROWS = 2048  # several shards in a short run, so that the last one's writing is not all that is seen


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


def ragged_documents(n_tokens: int, *, evenly: bool = False) -> list[str]:
    """Return seeded documents of 16 to 256 tokens, BOS included, in random order, about `n_tokens` together.

    Their lengths are spread evenly in the logarithm, as texts' are, or in themselves where `evenly` says so.
    """
    random = np.random.default_rng(0)
    lengths = (
        random.uniform(SHORTEST, LONGEST, n_tokens)
        if evenly
        else np.exp(random.uniform(np.log(SHORTEST), np.log(LONGEST), n_tokens))
    )
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), n_tokens))].astype(int)
    tokenizer = load_tokenizer(assets().model)
    words = " ".join(document["text"] for document in assets().documents()[:400]).split()
    alone = len(tokenizer.encode(["a"]).ids)
    n_tokens_of = np.array([len(tokenizer.encode([f"a {word}"]).ids) - alone for word in words])
    ends = np.cumsum(n_tokens_of)
    documents = []
    for length in lengths - 1:
        first = int(random.integers(0, np.searchsorted(ends, ends[-1] - 300)))
        last = int(np.searchsorted(ends, ends[first] - n_tokens_of[first] + length, side="right"))
        documents.append(" ".join(words[first:last]))
    return documents


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


class Parts:
    """What an extraction is made of, each part alone, over the batches and tiles of one store."""

    def __init__(self, store: Path, model: LoadedModel, sae: Path) -> None:
        reader = StoreReader(store)
        self.shards = [TokenShard(shard, reader.tokens(shard)) for shard in range(reader.layout.n_shards)]
        batches = [batch for shard in self.shards for batch in plan_batches(shard, reader.store.batch_tokens)]
        self.pairs = [(torch.from_numpy(batch.token_ids), torch.from_numpy(batch.attention_mask)) for batch in batches]
        self.model = model
        with np.load(sae / "params.npz") as weights:
            self.w_enc, self.b_enc, self.threshold = (
                torch.from_numpy(weights[name]) for name in ("W_enc", "b_enc", "threshold")
            )
        self.rows = torch.randn(reader.layout.n_rows, D_MODEL, generator=torch.Generator().manual_seed(2))

    def forward(self) -> float:
        """Return the seconds of all layers, no head, batches sorted by length."""
        return seconds(lambda: forward(self.model, self.pairs, N_LAYERS - 1))

    def to_middle(self) -> float:
        """Return the seconds of the layers that the SAE needs."""
        return seconds(lambda: forward(self.model, self.pairs, MIDDLE))

    def in_order(self) -> float:
        """Return the seconds of all layers over batches in the dataset's order."""
        return seconds(lambda: forward(self.model, in_order(self.shards), N_LAYERS - 1))

    def encode(self) -> float:
        """Return the seconds of finding every firing: feature and activation."""
        return seconds(lambda: [self._firings(rows) for rows in torch.split(self.rows, TILE_ROWS)])

    def _firings(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = torch.addmm(self.b_enc, rows, self.w_enc)
        places = (before > self.threshold).nonzero(as_tuple=True)
        return places[1].int(), before[places]


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
    home: Path, model: Gemma2ForCausalLM, documents: list[str], shard_rows: int = SHARD_ROWS, **asked: Any
) -> float:
    """Return the seconds of the loop of one kind of extraction."""
    outcome = actstore.extract(
        model,
        documents,
        tokenizer=str(assets().model),
        out=home,
        context=256,
        device="cpu",
        shard_rows=shard_rows,
        predictions=False,
        allow_unhealthy=True,
        with_index=False,
        **asked,
    )
    print(f"  {home.name}: {outcome.report}", flush=True)
    return outcome.seconds


def between(alone: Callable[[], float], run: Callable[[], float]) -> float:
    """Return what a part takes alone, before and after a run, over what the run takes."""
    before, taken = alone(), run()
    return statistics.mean((before, alone())) / taken


def ratios(home: Path, causal_lm: Gemma2ForCausalLM, parts: Parts, documents: list[str], sae: Path) -> list[float]:
    """Return dense, dense with an SAE, and an SAE alone, each over its limit."""
    source = f"{sae}@resid_post.{MIDDLE}"

    def dense() -> float:
        return extracted(home / "dense", causal_lm, documents, sites=["resid_post.*"])

    def both() -> float:
        return extracted(home / "dense and SAE", causal_lm, documents, sites=["resid_post.*"], saes=[source])

    def sparse() -> float:
        return extracted(home / "SAE", causal_lm, documents, saes=[source])

    return [
        between(parts.forward, dense),
        between(lambda: parts.forward() + parts.encode(), both),
        between(lambda: parts.to_middle() + parts.encode(), sparse),
    ]


def padding(home: Path, causal_lm: Gemma2ForCausalLM, model: LoadedModel, documents: list[str], sae: Path) -> float:
    """Return the time of batches in the dataset's order over that of ours, in one shard of the default size."""
    extracted(home, causal_lm, documents, DEFAULT_SHARD_ROWS, sites=["resid_post.0"])
    parts = Parts(home, model, sae)
    n_padded = sum(token_ids.numel() for token_ids, _ in parts.pairs)
    n_real = sum(int(mask.sum()) for _, mask in parts.pairs)
    print(f"  batches: {n_padded / n_real:.3f} padded tokens for each real one, {n_padded // len(parts.pairs)} a batch")
    return 1 / between(parts.forward, parts.in_order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--evenly", action="store_true", help="for padding, lengths spread evenly: at most 1.88 then")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_freed_memory()  # the parts alone must not pay for page faults either
    print(f"machine: {workload.machine()}, {torch.get_num_threads()} threads of torch")
    documents, causal_lm = ragged_documents(asked.tokens), seeded_model()
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        home = Path(temporary)
        model = load_model(causal_lm)
        sae = write_sae(home / "sae" / "average_l0_80", model, documents)
        extracted(home / "warm", causal_lm, documents, sites=["resid_post.0"])
        parts = Parts(home / "warm", model, sae)
        rounds = [ratios(home / str(number), causal_lm, parts, documents, sae) for number in range(asked.rounds)]
        one_shard = ragged_documents(int(0.95 * DEFAULT_SHARD_ROWS), evenly=asked.evenly)
        saved = padding(home / "one shard", causal_lm, model, one_shard, sae)
    dense, both, sparse = (statistics.median(one) for one in zip(*rounds, strict=True))
    show(
        [
            Measure("dense 8 layers / bare forward", dense, 0.93, 0.97),
            Measure("dense + SAE / (bare forward + encode)", both, 0.93, 0.97),
            Measure("SAE alone / (bare forward to its layer + encode)", sparse, 0.93, 0.97),
            Measure("dataset-order padding / sorted by length, ragged documents", saved, 2.0, 2.2),
        ]
    )
    print(f"peak resident memory of the whole run: {workload.peak_memory_mb():.0f} MB")


if __name__ == "__main__":
    main()
