"""Does memory grow with the corpus? The peak of an extraction of four times as many tokens, over that of one.

python benchmarks/memory.py [--tokens 150000] [--rounds 3]

Each size is extracted in a process of its own, the sizes in turns: two sites, one SAE, predictions. What is computed
and what is written beside it meet differently in every run, so the median of the peaks counts. The index, built
afterwards, takes more for more firings up to a bound of its own: see benchmarks/index.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import workload
from measures import Measure, show

TIMES = 4


def documents_of(n_tokens: int) -> list[dict[str, Any]]:
    """Return the embedded documents again and again, until they have about so many tokens."""
    from actstore.corpus import load_tokenizer
    from actstore.demo import assets

    documents = assets().documents()
    n_held = len(load_tokenizer(assets().model).encode([document["text"] for document in documents]).ids)
    return list(islice(cycle(documents), round(n_tokens * len(documents) / n_held)))


def extracted(sender: Connection, out: Path, n_tokens: int) -> None:
    """Extract, and send rows stored and the peak of resident memory in MB."""
    from actstore.demo import assets

    sae = assets().saes[0]
    outcome = workload.build_store(
        out,
        documents_of(n_tokens),
        sites=["resid_post.0", "resid_post.5"],
        saes=[str(sae)],
        with_index=False,
    )
    sender.send((outcome.n_rows_made, workload.peak_memory_mb()))


def peak(home: Path, n_tokens: int) -> tuple[int, float]:
    """Return rows and peak memory in MB of one extraction in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=extracted, args=(sender, home / str(n_tokens), n_tokens))
    process.start()
    found: tuple[int, float] = receiver.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found: list[list[tuple[int, float]]] = []
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as home:
            found.append([peak(Path(home), asked.tokens * times) for times in (1, TIMES)])
    n_rows, peaks = zip(*(zip(*size, strict=True) for size in zip(*found, strict=True)), strict=True)
    for rows, memory_mb in zip(n_rows, peaks, strict=True):
        print(f"{rows[0]:>8} tokens: peak resident memory {', '.join(f'{one:.0f}' for one in memory_mb)} MB")
    growth = 100 * (statistics.median(peaks[1]) / statistics.median(peaks[0]) - 1)
    name = f"growth of resident memory, {n_rows[0][0] / 1000:.0f} k to {n_rows[1][0] / 1000:.0f} k tokens"
    show([Measure(name, growth, 10, 2, "%", less=True)])


if __name__ == "__main__":
    main()
