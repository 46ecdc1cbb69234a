"""Does memory grow with the corpus? The peak of an extraction of four times as many tokens, over that of one.

python benchmarks/memory.py [--tokens 150000]

Each size is extracted in a process of its own: two sites, one SAE, predictions. The index, built afterwards, takes more
for more firings up to a bound of its own: see benchmarks/index.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import workload
from measures import Measure, show

TIMES = 4


def extracted(sender: Connection, out: Path, n_tokens: int) -> None:
    """Extract, and send rows stored and the peak of resident memory in MB."""
    from actstore.demo import assets

    sae = assets().saes[0]
    outcome = workload.build_store(
        out,
        workload.repeated_documents(n_tokens),
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
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        sizes = [peak(Path(home), asked.tokens * times) for times in (1, TIMES)]
    for n_rows, memory_mb in sizes:
        print(f"{n_rows:>8} tokens: peak resident memory {memory_mb:.0f} MB")
    growth = 100 * (sizes[1][1] / sizes[0][1] - 1)
    name = f"growth of resident memory, {sizes[0][0] / 1000:.0f} k to {sizes[1][0] / 1000:.0f} k tokens"
    show([Measure(name, growth, 10, 2, "%", less=True)])


if __name__ == "__main__":
    main()
