"""Random rows of a stored site against the same rows of a memory-mapped file; and a question over a whole store.

python benchmarks/gather.py [--tokens 100000]

Extracts the embedded world with one site. Warm: the same rows were asked for before, of both. First time: of a store
just opened, whose chunks must be decoded; its files are in the system's cache, as the memory-mapped one is.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import workload
from measures import Measure, show

import actstore
from actstore.demo import assets

SITE, TIMES, BATCH_ROWS = "resid_post.3", 30, 2048
NEAREST = f"""SELECT row FROM tokens
    ORDER BY list_cosine_similarity(act('{SITE}', row), feature_direction($sae, $feature)) DESC LIMIT 20"""

Rows = npt.NDArray[Any]


def mapped(store: actstore.api.Store, path: Path) -> Rows:
    """Write a site as one plain file and return it memory-mapped: (row, width), filler included."""
    array: Any = store[SITE].zarr
    np.save(path, np.asarray(array[:]))
    values: Rows = np.load(path, mmap_mode="r", allow_pickle=False)
    return values


def batches(rows: Rows) -> list[Rows]:
    """Return rows in batches as large as DuckDB's."""
    return [rows[first : first + BATCH_ROWS] for first in range(0, len(rows), BATCH_ROWS)]


def gather_mapped(values: Rows, parts: list[Rows]) -> None:
    """Take every batch from the memory-mapped file."""
    for rows in parts:
        values[rows].astype(np.float32, copy=False)


def gather_stored(store: actstore.api.Store, parts: list[Rows]) -> None:
    """Take every batch from the store, as `act` does."""
    for rows in parts:
        store.functions.vectors(SITE, rows)


def compare(name: str, path: Path, home: Path, rows: Rows) -> Measure:
    """Print a line: what the rows take, in this order, from both; return their ratio."""
    parts = batches(rows)
    with actstore.open(path) as store:
        values = mapped(store, home / "site.npy")
        started = time.perf_counter()
        gather_stored(store, parts)
        first = 1000 * (time.perf_counter() - started)
        plain, _ = workload.percentiles(lambda: gather_mapped(values, parts), TIMES)
        ours, _ = workload.percentiles(lambda: gather_stored(store, parts), TIMES)
    rate = 1000 * len(rows) / ours
    print(f"{name:<16} {plain:>10.1f} {ours:>10.1f} {ours / plain:>6.2f} {first:>14.1f} {rate:>12.0f}", flush=True)
    return Measure(f"act() of rows {name} / memory-mapped file", ours / plain, 3, 2, "x", less=True)


def report(path: Path, home: Path) -> None:
    """Print a line for each order of rows, then what a question over all of them takes."""
    print(
        f"{'rows asked for':<16} {'mapped ms':>10} {'store ms':>10} {'ratio':>6} {'first time ms':>14} {'rows/s':>12}"
    )
    with actstore.open(path) as store:
        rows = np.asarray(store.sql("SELECT row FROM tokens ORDER BY row").table["row"])
        asked = {"sae": store.saes[0], "feature": 17}
        p50, p95 = workload.percentiles(lambda: store.sql(NEAREST, asked), TIMES)
    orders = {"in order": rows, "at random": np.random.default_rng(0).permutation(rows)}
    show([compare(name, path, home, one) for name, one in orders.items()])
    print(f"20 rows nearest to a feature, of {len(rows)}: {p50:.0f} ms (p95 {p95:.0f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000)
    n_tokens = parser.parse_args().tokens
    print(f"machine: {workload.machine()}")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        sae = next(str(one) for one in assets().saes if "res/layer_3" in str(one))
        documents = workload.repeated_documents(n_tokens)
        workload.build_store(home / "a.act", documents, sites=[SITE], saes=[sae], predictions=False)
        report(home / "a.act", home)


if __name__ == "__main__":
    main()
