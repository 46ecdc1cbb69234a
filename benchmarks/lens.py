"""The offline logit lens of a document against the bare matrix product over the same numbers.

python benchmarks/lens.py [--vocabulary 256000] [--width 2304] [--tokens 100] [--rounds 3]

Writes a store of one document with one random site and a random bfloat16 unembedding with final norm and soft cap, by
default of Gemma 2's sizes. A process of its own then asks for the lens and, in turn with it, multiplies the same rows
with the same unembedding in plain numpy: blocks of a memory-mapped file widened to float32, nothing checked and nothing
kept. Both take turns; shown are the least and the median of the rounds. A second process, which asks for the lens
alone, says what memory it takes: anonymous memory, which files in the system's cache are no part of. Both files are in
that cache. Last, the lens of all rows is stored (save-lens, which runs in torch).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lens_store
import ml_dtypes
import numpy as np
import numpy.typing as npt
import workload
from measures import Measure, show

import actstore

K = 5
PLAIN = "widen and multiply"
KEPT_BYTES = 64 << 20  # of bfloat16: of smaller ones the product alone is shown as well, as they are kept widened
TOKENS_PER_BLOCK = 4096
FUNCTION = f"SELECT row, logit_lens('{lens_store.SITE}', row, {K}) AS top FROM tokens WHERE doc = 0 ORDER BY row"

Rows = npt.NDArray[np.float32]


def blocks(weight: npt.NDArray[Any]) -> Iterator[tuple[int, Rows]]:
    """Yield the first token and the rows of each block of the unembedding, widened to float32 in one place."""
    wide = np.empty((TOKENS_PER_BLOCK, weight.shape[1]), np.uint32)
    for first in range(0, len(weight), TOKENS_PER_BLOCK):
        narrow = weight[first : first + TOKENS_PER_BLOCK]
        block = wide[: len(narrow)]
        block[...] = narrow
        np.left_shift(block, 16, out=block)
        yield first, block.view(np.float32)


def multiply(rows: Rows, weight: npt.NDArray[Any]) -> None:
    """Widen and multiply: what no lens can leave out."""
    logits = np.empty((len(rows), TOKENS_PER_BLOCK), np.float32)
    for _, block in blocks(weight):
        np.matmul(rows, block.T, out=logits[:, : len(block)])


def multiply_widened(rows: Rows, wide: Rows) -> None:
    """Multiply alone."""
    np.matmul(rows, wide.T)


def expected(rows: Rows, weight: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return all log-probabilities (row, token), in float64 after the product."""
    logits = np.concatenate([rows @ block.T for _, block in blocks(weight)], axis=1).astype(np.float64)
    capped = lens_store.SOFTCAP * np.tanh(logits / lens_store.SOFTCAP)
    highest = capped.max(axis=1, keepdims=True)
    return np.asarray(capped - highest - np.log(np.exp(capped - highest).sum(axis=1, keepdims=True)))


def normed(rows: Rows) -> Rows:
    """Return what the unembedding is multiplied with: the final norm's answer, rounded to bfloat16."""
    scale = 1 / np.sqrt(np.mean(rows.astype(np.float64) ** 2, axis=1, keepdims=True) + lens_store.NORM_EPSILON)
    rounded: Rows = (rows * scale).astype(ml_dtypes.bfloat16).astype(np.float32)
    return rounded


def largest_difference(store: actstore.api.Store, rows: Rows, weight: npt.NDArray[Any]) -> float:
    """Return by how much the lens' tokens are less likely than the reference's, or their log-probabilities differ."""
    table = store.query("logit_lens", {"doc": 0, "k": K}).table
    token_ids = np.asarray(table["token_id"]).reshape(-1, K)
    given = np.asarray(table["logprob"]).reshape(-1, K)
    truth = expected(rows, weight)
    best = -np.sort(-np.partition(truth, -K, axis=1)[:, -K:], axis=1)
    chosen = np.take_along_axis(truth, token_ids.astype(np.int64), axis=1)
    return float(max(np.abs(best - chosen).max(), np.abs(best - given).max()))


def times(home: Path, rounds: int) -> dict[str, Any]:
    """Return the milliseconds of each kind of asking, in turns, and how far the answers are apart."""
    weight = np.load(home / lens_store.PLAIN_FILE, mmap_mode="r", allow_pickle=False)
    with actstore.open(home / lens_store.STORE) as store:
        rows = normed(store[lens_store.SITE][:])
        asked: dict[str, Callable[[], Any]] = {
            PLAIN: lambda: multiply(rows, weight),
            "SQL function": lambda: store.sql(FUNCTION),
            "query logit_lens": lambda: store.query("logit_lens", {"doc": 0, "k": K}),
        }
        if weight.nbytes <= KEPT_BYTES:
            wide = np.concatenate([block.copy() for _, block in blocks(weight)])
            asked["multiply alone"] = lambda: multiply_widened(rows, wide)
        taken = in_turns(asked, rounds)
        return {"milliseconds": taken, "difference": largest_difference(store, rows, weight)}


def in_turns(asked: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each, one after the other in every round; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(rounds + 1):
        for name, ask in asked.items():
            started = time.perf_counter()
            ask()
            taken[name].append(1000 * (time.perf_counter() - started))
    return {name: one[1:] for name, one in taken.items()}


def memory(home: Path) -> dict[str, Any]:
    """Return the largest anonymous memory, in MB, before the lens is asked for and while it is."""
    with actstore.open(home / lens_store.STORE) as store:
        store.sql("SELECT 1")
        before = memory_mb("RssAnon")
        with largest_anonymous_mb() as seen:
            store.query("logit_lens", {"doc": 0, "k": K})
        return {"before": before, "largest": max(seen), "resident": memory_mb("VmHWM")}


@contextmanager
def largest_anonymous_mb() -> Iterator[list[float]]:
    """Look at this process' anonymous memory every two milliseconds."""
    seen, done = [memory_mb("RssAnon")], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            seen.append(memory_mb("RssAnon"))

    watcher = threading.Thread(target=look)
    watcher.start()
    yield seen
    done.set()
    watcher.join()


def memory_mb(name: str) -> float:
    """Return a figure of this process: RssAnon, what is in memory and no file's, or VmHWM, the most that ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def save(home: Path, n_tokens: int) -> dict[str, Any]:
    """Return how many rows a second are stored by save-lens."""
    from actstore.lens_saving import LensRequest, save_lens

    outcome = save_lens(LensRequest(store=home / lens_store.STORE, k=K, device="cpu"))
    return {"seconds": outcome.seconds, "rows_per_second": n_tokens / outcome.seconds}


def measured(what: str, home: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Return what a process of its own finds."""
    command = [sys.executable, __file__, "--measure", what, "--home", str(home)]
    sizes = ["--rounds", str(asked.rounds), "--tokens", str(asked.tokens)]
    finished = subprocess.run([*command, *sizes], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def report(home: Path, asked: argparse.Namespace) -> None:
    """Print a line for every figure."""
    found = measured("times", home, asked)
    plain = found["milliseconds"].pop(PLAIN)
    print(f"{'':<24} {'least ms':>9} {'median ms':>10} {'ratio of leasts':>16}")
    for name, taken in {PLAIN: plain, **found["milliseconds"]}.items():
        print(f"{name:<24} {min(taken):>9.1f} {np.median(taken):>10.1f} {min(taken) / min(plain):>16.2f}", flush=True)
    print(f"largest difference of the top {K} from the reference: {found['difference']:.1e} nats")
    used = measured("memory", home, asked)
    print(
        f"anonymous memory: {used['largest']:.0f} MB at most, {used['before']:.0f} MB before the question; "
        f"peak resident {used['resident']:.0f} MB"
    )
    show(measures(asked.vocabulary, found["milliseconds"], plain, used["largest"]))
    saved = measured("save", home, asked)
    print(f"save-lens: {saved['rows_per_second']:.1f} rows/s ({saved['seconds']:.1f} s)")


def measures(vocabulary: int, taken: dict[str, list[float]], plain: list[float], memory_mb: float) -> list[Measure]:
    """Return what is to be reached: of a small vocabulary a time, of a large one a ratio and the memory."""
    ours = min(taken["query logit_lens"])
    where = f"vocabulary {vocabulary:,}"
    if "multiply alone" in taken:
        aim = 1.3 * min(taken["multiply alone"])
        return [Measure(f"logit lens of 100 tokens at a site, {where}", ours, 100, aim, "ms", less=True)]
    return [
        Measure(f"logit lens of 100 tokens / blocked product, {where}", ours / min(plain), 2, 1.3, less=True),
        Measure(f"anonymous memory of that lens, {where}", memory_mb, 1000, 500, "MB", less=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--width", type=int, default=2304)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=("times", "memory", "save"), help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        found = {
            "times": lambda: times(asked.home, asked.rounds),
            "memory": lambda: memory(asked.home),
            "save": lambda: save(asked.home, asked.tokens),
        }[asked.measure]()
        print(json.dumps(found))
        return
    print(f"machine: {workload.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACTSTORE_CACHE"] = f"{folder}/cache"  # the kit must not stay on the machine
        n_bytes = lens_store.write(Path(folder), asked.vocabulary, asked.width, asked.tokens)
        print(f"{asked.tokens} tokens, width {asked.width}, vocabulary {asked.vocabulary}: {n_bytes / 1e9:.2f} GB")
        report(Path(folder), asked)


if __name__ == "__main__":
    main()
