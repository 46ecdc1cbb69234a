"""What both benchmarks run on: the embedded world, its dataset repeated to a size, and the machine they ran on."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from actstore.demo import assets
from actstore.maintenance import extract_and_index
from actstore.recipe import CorpusIdentity, ModelIdentity

__all__ = [
    "DIGEST",
    "build_store",
    "corpus_of",
    "machine",
    "model_that_is_nowhere",
    "peak_memory_mb",
    "percentiles",
    "repeated_documents",
]

CONTEXT = 256
DIGEST = "0" * 64  # of what is generated and was never read


def machine() -> str:
    """Return the machine in a line."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?"
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return f"{os.cpu_count()} cores of {model}, {memory / 1e6:.0f} GB, Python {platform.python_version()}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def repeated_documents(n_tokens: int) -> list[dict[str, Any]]:
    """Return the embedded dataset, repeated until it has about so many tokens (a token is about four characters)."""
    documents = assets().documents()
    characters = sum(len(document["text"]) for document in documents)
    return documents * max(1, round(4 * n_tokens / characters))


def build_store(out: Path, documents: list[dict[str, Any]], **options: Any) -> Any:
    """Extract the embedded model over documents on the CPU in float32; `options` as for `Request`."""
    return extract_and_index(
        model=str(assets().model),
        dataset=documents,
        out=out,
        dtype="float32",
        device="cpu",
        context=CONTEXT,
        **options,
    )


def model_that_is_nowhere(name: str) -> ModelIdentity:
    """Return the identity of a model of which only generated numbers are stored."""
    digests = {"config_digest": DIGEST, "weights_digest": DIGEST}
    return ModelIdentity(name=name, revision=None, architecture="Gemma2ForCausalLM", **digests)


def corpus_of(context: int, shard_rows: int, batch_tokens: int) -> CorpusIdentity:
    """Return the identity of a generated corpus."""
    return CorpusIdentity(
        documents_digest=DIGEST,
        max_tokens=None,
        tokenizer_digest=DIGEST,
        context=context,
        stride=context,
        shard_rows=shard_rows,
        batch_tokens=batch_tokens,
    )


def percentiles(ask: Callable[[], Any], times: int) -> tuple[float, float]:
    """Return the p50 and p95 of a call, in milliseconds, after one call that is not counted."""
    ask()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        ask()
        taken.append(1000 * (time.perf_counter() - started))
    return float(np.percentile(taken, 50)), float(np.percentile(taken, 95))
