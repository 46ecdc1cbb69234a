"""The rate at which an index is built, and what a firing costs in it, from few firings to many.

python benchmarks/index.py [--firings 20e6] [--saes 1] [--large]

Writes the firings of an SAE as the bundles that an extraction writes (16,384 features whose frequencies fall like
Zipf's law, about 80 on a row; with `--saes`, as many SAEs share them), then builds the index from them: every point in
a process of its own, so that its peak memory is its own. Tokens and reconstruction are indexed too, made up as they are
asked for. What the index says of some features is compared with numpy over the bundles. `--large` adds 300 million
firings, for which 2 GB of disk are used.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import workload
from measures import Measure, show

from actstore.blocks import FLAG_SPECIAL, TOKEN_FIELDS, FiringsSpec, RowFirings
from actstore.index import Catalog, build_index, open_index
from actstore.store.csr import decode_firings, encode_firings

N_FEATURES, FIRINGS_PER_ROW = 16_384, 80
SHARD_ROWS, SEQUENCE_ROWS = 16_384, 256
N_DRAWN = 1 << 20  # places among which features are drawn
LARGE = 300e6
MANY_A_FEATURE = 1000
PROVED_FEATURES = (0, 5, 700, 9_000, N_FEATURES - 1)
STATISTICS = "n_firings, max_activation, p50, p90, p99, mean_activation, std_activation"


@dataclass(frozen=True)
class OneSegment:
    """All documents at once, one for each shard."""

    n_shards: int
    segment: int = 0
    first_doc: int = 0
    first_seq: int = 0
    first_shard: int = 0

    @property
    def n_docs(self) -> int:
        return self.n_shards

    @property
    def n_seqs(self) -> int:
        return self.n_shards * SHARD_ROWS // SEQUENCE_ROWS


class GeneratedTruth:
    """A truth whose firings are bundles on the disk, read and proved as a store reads them; the rest is made up."""

    shard_rows = SHARD_ROWS

    def __init__(self, home: Path, n_firings: float, n_saes: int) -> None:
        """Write the bundles of about so many firings of all SAEs together."""
        self.home = home
        self.saes = [f"generated-{number}" for number in range(n_saes)]
        self.n_shards = max(1, round(n_firings / n_saes / FIRINGS_PER_ROW / SHARD_ROWS))
        self.digests: dict[int, str] = {}
        self.n_firings = self.n_bytes = 0
        frequencies = 1 / (40 + np.arange(N_FEATURES))
        reached = np.cumsum(frequencies / frequencies.sum())
        self._drawn = np.searchsorted(reached, (np.arange(N_DRAWN) + 0.5) / N_DRAWN).astype(np.uint32)
        for shard in range(self.n_shards):
            self._write(shard)

    def _write(self, shard: int) -> None:
        firings = self._generated(shard)
        data = encode_firings(FiringsSpec(self.saes[0], N_FEATURES), firings)
        self._path(shard).write_bytes(data)
        self.digests[shard] = hashlib.sha256(data).hexdigest()
        self.n_firings += len(firings.features) * len(self.saes)
        self.n_bytes += len(data) * len(self.saes)

    def _generated(self, shard: int) -> RowFirings:
        random = np.random.default_rng(shard)
        rows = np.delete(np.arange(SHARD_ROWS, dtype=np.uint32), slice(None, None, SEQUENCE_ROWS))
        features = self._drawn[random.integers(0, N_DRAWN, (len(rows), FIRINGS_PER_ROW))]
        keys = np.sort((rows[:, None] * np.uint32(N_FEATURES) + features).reshape(-1))
        keys = keys[np.append(True, keys[1:] != keys[:-1])]
        counts = np.bincount(keys // np.uint32(N_FEATURES), minlength=SHARD_ROWS)
        indptr = np.concatenate([[0], np.cumsum(counts)])
        # Rounded to the ten bits of mantissa that a store keeps.
        bits = random.lognormal(1.5, 0.7, len(keys)).astype(np.float32).view(np.uint32) + 0x1000 & 0xFFFFE000
        activations = bits.astype(np.uint32).view(np.float32)
        return RowFirings(indptr, (keys % np.uint32(N_FEATURES)).astype(np.uint16), activations)

    def _path(self, shard: int) -> Path:
        return self.home / f"{shard}.zip"

    def tables(self) -> Mapping[str, list[dict[str, Any]]]:
        return {"saes": [{"sae": sae, "site": "resid_post.0", "layer": 0, "width": N_FEATURES} for sae in self.saes]}

    def vocabulary(self) -> pa.Array:
        return pa.array(["<bos>", "token"])

    def segments(self) -> Sequence[OneSegment]:
        return [OneSegment(self.n_shards)]

    def documents(self, segment: int) -> Iterator[pa.RecordBatch]:
        yield from ()

    def sequences(self, segment: int) -> npt.NDArray[np.int64]:
        seqs = np.arange(self.segments()[0].n_seqs)
        rows = seqs * SEQUENCE_ROWS
        return np.stack([rows // SHARD_ROWS, rows, np.full(len(seqs), SEQUENCE_ROWS)], 1)

    def done(self, artifact: str) -> Mapping[int, str]:
        return self.digests if artifact in ("corpus/tokens", *(f"firings/{sae}" for sae in self.saes)) else {}

    def matrix(self, path: str, shard: int) -> npt.NDArray[Any]:
        rows = np.arange(SHARD_ROWS)
        if path.startswith("reconstruction"):
            return np.full((SHARD_ROWS, 3), FIRINGS_PER_ROW, np.float32)
        fields: dict[str, npt.NDArray[Any]] = dict.fromkeys(TOKEN_FIELDS, np.zeros(SHARD_ROWS, np.int32))
        fields["pos"] = rows % SEQUENCE_ROWS
        fields["seq"] = (shard * SHARD_ROWS + rows) // SEQUENCE_ROWS
        fields["flags"] = np.where(fields["pos"] == 0, FLAG_SPECIAL, 0)
        fields["role"] = np.full(SHARD_ROWS, -1)
        return np.stack([fields[name] for name in TOKEN_FIELDS], 1).astype(np.int32)

    def firings(self, sae: str, shard: int) -> RowFirings:
        data = self._path(shard).read_bytes()
        assert hashlib.sha256(data).hexdigest() == self.digests[shard]
        return decode_firings(data, self._path(shard).name)

    def feature_logits(self, sae: str) -> None:
        return None

    def labels(self) -> list[tuple[str, int, str]]:
        return []


def prove(source: GeneratedTruth, catalog: Catalog, directory: Path) -> None:
    """Compare statistics and examples of some features of the last SAE with numpy over all bundles."""
    sae = source.saes[-1]
    found: dict[int, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = {feature: [] for feature in PROVED_FEATURES}
    for shard in range(source.n_shards):
        firings = source.firings(sae, shard)
        rows = firings.rows() + shard * SHARD_ROWS
        for feature, kept in found.items():
            here = firings.features == feature
            kept.append((rows[here], firings.activations[here]))
    with open_index(catalog, lambda name: directory / name, threads=1) as connection:
        for feature, kept in found.items():
            rows, values = (np.concatenate(column) for column in zip(*kept, strict=True))
            where = f"WHERE sae = '{sae}' AND feature = {feature}"
            said = connection.sql(f"SELECT {STATISTICS} FROM features {where}").table.to_pylist()[0]
            order = np.sort(values)
            exact = [len(values), order[-1], *(order[-(-len(order) * p // 100) - 1] for p in (50, 90, 99))]
            assert list(said.values())[:5] == exact, (feature, said, exact)
            close = [values.mean(dtype=np.float64), values.std(dtype=np.float64)]
            assert np.allclose(list(said.values())[5:], close, rtol=1e-9), (feature, said, close)
            listed = connection.sql(f"SELECT row FROM examples {where} ORDER BY rank").table
            assert listed["row"].to_pylist() == rows[np.lexsort((rows, -values))[:100]].tolist(), feature


def measure(n_firings: float, n_saes: int) -> None:
    """Generate, build, compare and print one line."""
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "truth").mkdir()
        source = GeneratedTruth(Path(home) / "truth", n_firings, n_saes)
        index = Path(home) / "index"
        before = workload.peak_memory_mb()
        started, started_work = time.perf_counter(), time.process_time()
        catalog = build_index(source, index, compact=True)
        seconds, work = time.perf_counter() - started, time.process_time() - started_work
        peak = workload.peak_memory_mb()
        n_bytes = sum(part.n_bytes for part in catalog.parts if part.kind == "firings")
        prove(source, catalog, index)
    n = source.n_firings
    truth, indexed = source.n_bytes / n, n_bytes / n
    print(
        f"{n:>12} {n_saes:>5} {seconds:>8.1f} {n / seconds / 1e6:>7.2f} {work:>8.1f} {1e9 * work / n:>12.0f}"
        f" {truth:>8.2f} {indexed:>8.2f} {truth + indexed:>6.2f} {before:>10.0f} {peak:>8.0f}",
        flush=True,
    )
    size = f"of {n / 1e6:.0f} M firings" + (f" of {n_saes} SAEs" if n_saes > 1 else "")
    rate = Measure(f"index built, statistics and examples included, {size}", n / seconds / 1e6, 5, 15, "M/s")
    # Of few firings a feature, much of the index is what it says of the feature: a firing's bytes are seen with many.
    stored = Measure(f"truth and index, {size}", truth + indexed, 6.6, 6.0, "B/firing", less=True)
    memory = Measure(f"peak memory of the build, {size}", peak, 2048, 1024, "MB", less=True)
    show([rate, stored, memory] if n > MANY_A_FEATURE * n_saes * N_FEATURES else [rate, memory])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--firings", type=float, nargs="+", default=[20e6])
    parser.add_argument("--saes", type=int, nargs="+", default=[1])
    parser.add_argument("--large", action="store_true", help="300 million firings as well")
    arguments = parser.parse_args()
    print(f"machine: {workload.machine()}")
    print(
        f"{'firings':>12} {'SAEs':>5} {'seconds':>8} {'M/s':>7} {'CPU s':>8} {'CPU ns each':>12} {'truth B':>8}"
        f" {'index B':>8} {'sum':>6} {'MB before':>10} {'MB peak':>8}"
    )
    for n_firings, n_saes in product([*arguments.firings, *([LARGE] if arguments.large else [])], arguments.saes):
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(n_firings, n_saes))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{n_firings:.0f} firings: the build failed")


if __name__ == "__main__":
    main()
