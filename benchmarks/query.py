"""Latency of the headline questions, and the rate at which the index is built.

python benchmarks/query.py [--tokens 200000]

Extracts the embedded world with all its SAEs, builds the index from nothing (timed), then asks each question many times
in one process (warm), and once in a fresh process (cold, interpreter start included).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import workload

import actstore
from actstore.demo import assets
from actstore.maintenance import index

TIMES = 30
CONTRACT = (
    "SELECT t.token, snippet(a.row, 10, 10) AS example, a.activation FROM activations a JOIN tokens t USING (row) "
    "WHERE a.sae = $sae AND a.feature = $feature ORDER BY a.activation DESC LIMIT 20"
)


def questions(store: actstore.api.Store, sae: str, feature: int) -> dict[str, Callable[[], Any]]:
    """Return the questions by the name that is printed."""
    row = store.sql("SELECT row FROM examples WHERE sae = ? AND feature = ? LIMIT 1", [sae, feature]).scalar()
    doc = store.sql("SELECT doc FROM tokens WHERE row = ?", [row]).scalar()
    of_feature = {"sae": sae, "feature": feature}
    return {
        "top 20 of a feature with windows": lambda: store.query("max_activating", of_feature),
        "the contract's SQL example": lambda: store.sql(CONTRACT, of_feature),
        "statistics of all features": lambda: store.sql("SELECT * FROM features WHERE sae = ?", [sae]),
        "top 20 of all features": lambda: store.sql("SELECT * FROM examples WHERE sae = ? AND rank <= 20", [sae]),
        "features on one token": lambda: store.query("token_features", {"sae": sae, "row": row}),
        "features of one document": lambda: store.query("document_features", {"sae": sae, "doc": doc}),
        "logit lens of a document": lambda: store.query("logit_lens", {"doc": doc}),
        "most surprising tokens": lambda: store.query("surprising_tokens"),
        "one activation vector": lambda: store["resid_post.3"][row],
    }


def build_index(store: Path) -> tuple[float, int]:
    """Return the seconds to build the whole index, and its bytes."""
    shutil.rmtree(store / "index", ignore_errors=True)
    started = time.perf_counter()
    catalog = index(store)
    return time.perf_counter() - started, sum(part.n_bytes for part in catalog.parts if part.kind == "firings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    n_tokens = parser.parse_args().tokens
    print(f"machine: {workload.machine()}")
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "bench.act"
        saes = [str(one) for one in assets().saes]
        workload.build_store(
            path, workload.repeated_documents(n_tokens), sites=["resid_post.*"], saes=saes, with_index=False
        )
        seconds, n_bytes = build_index(path)
        with actstore.open(path) as store:
            report(store, path, seconds, n_bytes)


def report(store: actstore.api.Store, path: Path, seconds: float, n_bytes: int) -> None:
    """Print index figures, then a line per question."""
    n_firings = store.sql("SELECT count(*) FROM activations").scalar()
    rows = store.reader.layout.n_rows
    print(f"{rows} tokens, {len(store.saes)} SAEs, {n_firings} firings")
    print(
        f"index: {seconds:.1f} s, {n_firings / seconds / 1e6:.2f} M firings/s, {n_bytes / n_firings:.2f} bytes/firing"
    )
    sae, feature = (
        store.sql("SELECT sae, feature FROM features WHERE n_firings > 100 ORDER BY n_firings, sae, feature LIMIT 1")
        .rows()[0]
        .values()
    )
    print(f"{'question (warm)':<36} {'p50 ms':>8} {'p95 ms':>8}")
    for name, ask in questions(store, sae, feature).items():
        p50, p95 = workload.percentiles(ask, TIMES)
        print(f"{name:<36} {p50:>8.2f} {p95:>8.2f}", flush=True)
    asked = {"sae": sae, "feature": feature}
    program = f"import actstore; actstore.open({str(path)!r}).query('max_activating', {asked})"
    cold = workload.percentiles(lambda: subprocess.run([sys.executable, "-c", program], check=True), 5)
    print(f"{'fresh process, open, top 20':<36} {cold[0]:>8.0f} {cold[1]:>8.0f}")


if __name__ == "__main__":
    main()
