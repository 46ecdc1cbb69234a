"""Extraction against the bare forward pass over the same batches, in one run.

python benchmarks/extract.py [--tokens 60000]

Prints tokens/s of each kind of extraction and its ratio to the bare forward pass (base model, no head, same batches),
bytes per token and per firing, and peak memory. Ratios can be compared between machines, tokens/s cannot.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import workload

from actstore.blocks import TokenShard
from actstore.demo import assets
from actstore.extraction.batches import plan_batches
from actstore.info import describe
from actstore.models import load_model
from actstore.store import StoreReader

KINDS: dict[str, dict[str, Any]] = {
    "one site": {"sites": ["resid_post.3"], "predictions": False},
    "all residual sites": {"sites": ["resid_post.*"], "predictions": False},
    "one SAE": {"saes": 1, "predictions": False},
    "all SAEs": {"saes": 99, "predictions": False},
    "predictions and a site": {"sites": ["resid_post.3"]},
    "the demo (all of it, lens too)": {"sites": ["resid_post.*"], "saes": 99, "lens_k": 5},
}


def options_of(kind: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an extraction, the number of SAEs replaced by their folders."""
    return kind | {"saes": [str(path) for path in assets().saes[: kind.get("saes", 0)]]}


def bare_forward(store: Path) -> float:
    """Return the seconds that the base model alone takes for all batches of a store."""
    reader, model = StoreReader(store), load_model(str(assets().model), dtype="float32", device="cpu")
    batches = [
        batch
        for shard in range(reader.layout.n_shards)
        for batch in plan_batches(TokenShard(shard, reader.tokens(shard)), reader.store.batch_tokens)
    ]
    started = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            ids, mask = torch.from_numpy(batch.token_ids), torch.from_numpy(batch.attention_mask)
            model.causal_lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=60_000)
    documents = workload.repeated_documents(parser.parse_args().tokens)
    print(f"machine: {workload.machine()}, {torch.get_num_threads()} threads")
    print(f"{'kind':<32} {'tokens/s':>9} {'bare tokens/s':>14} {'ratio':>6} {'bytes/token':>12} {'bytes/firing':>13}")
    with tempfile.TemporaryDirectory() as home:
        for name, kind in KINDS.items():
            store = Path(home) / name.split()[0] / name.replace(" ", "-")
            store.parent.mkdir(exist_ok=True)
            outcome = workload.build_store(store, documents, with_index=False, **options_of(kind))
            bare_seconds = bare_forward(store)  # beside each kind: the machine's speed drifts
            print_line(name, store, outcome, bare_seconds)
    print(f"peak resident memory of the whole run: {workload.peak_memory_mb():.0f} MB")


def print_line(name: str, store: Path, outcome: Any, bare_seconds: float) -> None:
    """Print one kind's figures; the ratio compares the time of the loop with the bare forward pass."""
    import actstore

    with actstore.open(store) as opened:
        sizes = dict(describe(opened).n_bytes)
        n_firings = sum(
            len(opened.reader.firings(sae, shard).features)
            for sae in opened.saes
            for shard in range(opened.reader.layout.n_shards)
        )
    firing_bytes = sum(path.stat().st_size for path in store.glob("firings/*/[0-9]*.zip"))
    total = sum(size for key, size in sizes.items() if key not in ("kit", "corpus"))
    per_firing = f"{firing_bytes / n_firings:.2f}" if n_firings else "-"
    n_rows, bytes_per_token = outcome.n_rows_made, total / outcome.n_rows_made
    speed, bare = n_rows / outcome.seconds, n_rows / bare_seconds
    print(
        f"{name:<32} {speed:>9.0f} {bare:>14.0f} {speed / bare:>6.2f} {bytes_per_token:>12.0f} {per_firing:>13}",
        flush=True,
    )


if __name__ == "__main__":
    main()
