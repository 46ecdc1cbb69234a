"""Dense storage against a memory-mapped file: how fast, how large, and what rounding loses; and bytes of a firing.

python benchmarks/storage.py [--tokens 20000] [--rounds 3]

Rows are real ones of the embedded world, the residual streams of all its layers side by side, and random ones as wide
as Gemma 2 2B's. Raw is what a memory-mapped file takes, written, flushed, fsynced and renamed as durably as ours; each
round measures all, one after the other, so that ratios are of one moment. Ours is all that a pass does for a shard:
both SHA-256, fsync, rename. Files that are read are in the system's cache. MB are those of the rows as they are given.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
import workload
import zarr
from generated import FIRINGS_PER_ROW, Shape, firings_of
from measures import Measure, show
from zarr.codecs import BloscCodec

import actstore
from actstore.blocks import FiringsSpec, MatrixSpec, RowFirings
from actstore.demo import assets
from actstore.quantised import dequantise, n_groups, quantise
from actstore.saes import round_mantissa
from actstore.sealed import fsync_directory
from actstore.store import StoreReader
from actstore.store.arrays import FILLER, array_metadata, encode_shard, memory_array
from actstore.store.csr import encode_firings
from actstore.store.files import prove_and_write
from actstore.store.plain_shards import is_plain, read_plain
from actstore.tensors import as_tensor

SHARD_ROWS, GEMMA_WIDTH, WINDOW_ROWS, MASSIVE_EVERY = 16_384, 2_304, 200, 210
SITES = [f"resid_post.{layer}" for layer in range(6)]

Rows = npt.NDArray[Any]


@dataclass(frozen=True)
class Way:
    """One way of keeping a shard: how it is written, and how rows of it are read."""

    name: str
    write: Callable[[], None]
    read: Callable[[slice], Rows]
    files: tuple[Path, ...]

    @property
    def n_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def raw_way(home: Path, rows: Rows) -> Way:
    """Return a memory-mapped file."""
    path, bits = home / "raw.bin", rows.view(np.uint8)

    def write() -> None:
        partial = path.with_suffix(".partial")
        mapped = np.memmap(partial, dtype=np.uint8, mode="w+", shape=bits.shape)
        mapped[:] = bits
        mapped.flush()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_directory(home)

    def read(window: slice) -> Rows:
        return np.array(np.memmap(path, dtype=np.uint8, mode="r", shape=bits.shape)[window]).view(rows.dtype)

    return Way("memory-mapped file", write, read, (path,))


def store_way(name: str, home: Path, rows: Rows, *, compressed: bool) -> Way:
    """Return a matrix as a pass writes it and a store reads it."""
    spec = MatrixSpec(
        "compressed" if compressed else "plain", rows.shape[1], str(rows.dtype), "width", compressed=compressed
    )
    matrix = Matrix(home, spec, len(rows))
    return Way(name, lambda: matrix.write(rows), matrix.read, (matrix.file,))


def zarr_way(name: str, home: Path, rows: Rows, codec: BloscCodec | None) -> Way:
    """Return a matrix that zarr's own pipeline writes and reads, with another codec."""
    length = max(1, (256 << 10) // rows[:1].nbytes)
    folder = home / name.replace(" ", "_")

    def write() -> None:
        array, files = memory_array(
            name="a",
            shape=rows.shape,
            chunks=(1 << length.bit_length() - 1, rows.shape[1]),
            shards=rows.shape,
            dtype=rows.dtype,
            fill=FILLER[str(rows.dtype)],
            axes=("row", "width"),
            codec=codec,
        )
        array[:] = rows
        folder.mkdir(exist_ok=True)
        (folder / "zarr.json").write_bytes(files["a/zarr.json"].to_bytes())
        prove_and_write(folder, "c.0.0", files["a/c.0.0"].to_bytes(), [rows])

    def read(window: slice) -> Rows:
        return np.asarray(zarr.open_array(folder, mode="r")[window])

    return Way(name, write, read, (folder / "c.0.0",))


def quantised_way(home: Path, rows: Rows) -> Way:
    """Return int8 with scales; what is read is float32."""
    width, n_rows = rows.shape[1], len(rows)
    values = Matrix(home, MatrixSpec("sites/small", width, "int8", "width", compressed=False), n_rows)
    scales = Matrix(home, MatrixSpec("scales/small", n_groups(width), "float32", "group"), n_rows)

    def write() -> None:
        small, steps = quantise(as_tensor(rows))
        values.write(small.numpy())
        scales.write(steps.numpy())

    return Way(
        "int8 with scales",
        write,
        lambda here: dequantise(values.read(here), scales.read(here)),
        (values.file, scales.file),
    )


@dataclass(frozen=True)
class Matrix:
    """One shard of a matrix below a folder, outside a store."""

    home: Path
    spec: MatrixSpec
    n_rows: int

    @property
    def file(self) -> Path:
        return self.home / self.spec.path / "c.0.0"

    def write(self, rows: Rows) -> None:
        prove_and_write(self.home, f"{self.spec.path}/c.0.0", encode_shard(self.spec, rows, self.n_rows), [rows])

    def read(self, window: slice) -> Rows:
        array = self._array
        return read_plain(self.file, array, window, None) if is_plain(array) else np.asarray(array[window])

    @cached_property
    def _array(self) -> zarr.Array[Any]:
        (self.file.parent / "zarr.json").write_bytes(array_metadata(self.spec, self.n_rows, self.n_rows))
        return zarr.open_array(self.file.parent, mode="r")


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def compare(name: str, rows: Rows, home: Path, rounds: int) -> tuple[float, float]:
    """Print a line for every way of keeping these rows; return the store's speed over raw, writing and reading."""
    ways = [
        raw_way(home, rows),
        store_way("uncompressed", home, rows, compressed=False),
        store_way("byte shuffle, zstd 1", home, rows, compressed=True),
        zarr_way("bit shuffle, lz4", home, rows, BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle")),
        zarr_way("uncompressed, by zarr", home, rows, None),
        quantised_way(home, rows),
    ]
    whole, window = slice(0, len(rows)), slice(5_000, 5_000 + WINDOW_ROWS)
    taken = np.array(
        [
            [
                [seconds(way.write), seconds(partial(way.read, whole)), seconds(partial(way.read, window))]
                for way in ways
            ]
            for _ in range(rounds)
        ]
    )  # round, way, kind
    ratios = np.median(taken[:, :1] / taken, axis=0)
    best = taken.min(axis=0)
    print(f"\n{name}: {rows.nbytes / 1e6:.0f} MB a shard")
    print(
        f"{'':24}{'size':>7}{'write MB/s':>12}{'/ raw':>7}{'read MB/s':>12}{'/ raw':>7}{'200 rows ms':>13}{'/ raw':>7}"
    )
    for way, ratio, (write, read, rows_read) in zip(ways, ratios, best, strict=True):
        megabytes = rows.nbytes / 1e6
        print(
            f"{way.name:24}{way.n_bytes / rows.nbytes:7.3f}{megabytes / write:12.0f}{ratio[0]:7.2f}"
            f"{megabytes / read:12.0f}{ratio[1]:7.2f}{1000 * rows_read:13.2f}{ratio[2]:7.2f}",
            flush=True,
        )
        if way.name != "int8 with scales":
            assert np.array_equal(way.read(window).view(np.uint8), rows[window].view(np.uint8)), way.name
    return float(ratios[1, 0]), float(ratios[1, 1])


def first_documents(n_tokens: int) -> list[dict[str, Any]]:
    """Return the first documents of the embedded dataset with about so many tokens, of four characters each."""
    documents = assets().documents()
    reached = np.cumsum([len(one["text"]) for one in documents])
    return documents[: 1 + int(np.searchsorted(reached, 4 * n_tokens))]


def store_of(home: Path, dtype: str, documents: list[dict[str, Any]], saes: list[str]) -> Path:
    """Extract the embedded world's residual streams in a storage dtype, with SAEs that read the model itself."""
    path = home / f"{dtype}.act"
    asked: dict[str, Any] = {"sites": SITES, "saes": saes, "predictions": False, "storage_dtype": dtype}
    workload.build_store(path, documents, with_index=False, **asked)
    return path


def rows_of(path: Path, site: str) -> Rows:
    """Return all rows of a site, of all shards: float32 (row, width)."""
    reader = StoreReader(path)
    found = [reader.matrix(f"sites/{site}", shard) for shard in sorted(reader.done(f"sites/{site}"))]
    return np.concatenate(found).astype(np.float32, copy=False)


def real_rows(path: Path) -> Rows:
    """Return the residual streams of all layers, side by side, of as many rows as a shard has: float32."""
    rows = np.concatenate([rows_of(path, site) for site in SITES], axis=1)
    return np.resize(rows, (SHARD_ROWS, rows.shape[1]))


def report_loss(exact: Path, rounded: Path, saes: list[str]) -> None:
    """Print what a storage dtype does to lens and SAEs: of each layer's residual stream."""
    actstore.encode(rounded, saes, device="cpu", with_index=False, allow_unhealthy=True)
    print(f"\n{rounded.stem}: {site_bytes(rounded) / site_bytes(exact):.3f} of float32's bytes")
    print(f"{'site':<12}{'error':>8}{'lens top-1 agrees':>19}{'firings flipped of 1,000':>30}")
    flipped = {site: flips(exact, rounded, sae) for sae, site in sae_sites(exact).items()}
    with actstore.open(exact) as one, actstore.open(rounded) as other:
        for site in SITES:
            was, now = rows_of(exact, site), rows_of(rounded, site)
            tokens = [
                store.functions.unembed(f"sites/{site}").top(rows, 1).token_ids
                for store, rows in ((one, was), (other, now))
            ]
            shown = f"{flipped[site]:.2f}" if site in flipped else "-"
            print(f"{site:<12}{relative(now, was):8.5f}{np.mean(tokens[0] == tokens[1]):19.2%}{shown:>30}", flush=True)


def proofs_of(path: Path) -> list[tuple[str, Any]]:
    """Return what the receipts say of every file, by its path."""
    receipts = [one for of in StoreReader(path).receipts.values() for one in of.values()]
    return [named for one in receipts for named in one["files"].items()]


def site_bytes(path: Path) -> int:
    """Return the bytes of all sites, with their scales."""
    return sum(proof["bytes"] for name, proof in proofs_of(path) if name.split("/")[1] in ("sites", "scales"))


def sae_sites(path: Path) -> dict[str, str]:
    return {row["sae"]: row["site"] for row in StoreReader(path).saes}


def flips(exact: Path, rounded: Path, sae: str) -> float:
    """Return how many firings are in one store and not in the other, per 1,000 of the exact one."""
    n_flipped = n_firings = 0
    was, now = StoreReader(exact), StoreReader(rounded)
    for shard in was.done(f"firings/{sae}"):
        here, there = ((one.rows() << 32) + one.features for one in (was.firings(sae, shard), now.firings(sae, shard)))
        n_flipped += len(np.setxor1d(here, there, assume_unique=True))
        n_firings += len(here)
    return 1000 * n_flipped / n_firings


def report_groups(real: Rows, wide: Rows) -> None:
    """Print what other groups and scales than the store's would be: error of usual channels, bytes of a number."""
    massive = wide[:4_096].copy()
    massive[:, ::MASSIVE_EVERY] *= 50
    usual = np.arange(massive.shape[1]) % MASSIVE_EVERY != 0
    print(f"\nint8 by group and mantissa of its scale; massive: one channel of {MASSIVE_EVERY} is 50 times larger")
    print(f"{'':30}{'real: error':>12}{'bytes':>8}{'massive: others':>18}{'bytes':>8}")
    for group, bits in ((massive.shape[1], 23), (128, 23), (64, 23), (32, 23), (16, 23), (16, 0), (16, 2), (16, 4)):
        shown = f"{group} channels, {bits} bits"
        small = rounded(real[:4_096], min(group, real.shape[1]), bits), rounded(massive, group, bits)
        errors = relative(small[0][0], real[:4_096]), relative(small[1][0][:, usual], massive[:, usual])
        print(f"{shown:30}{errors[0]:12.4f}{small[0][1]:8.3f}{errors[1]:18.4f}{small[1][1]:8.3f}", flush=True)


def rounded(rows: Rows, group: int, bits: int) -> tuple[Rows, float]:
    """Return rows as int8 would keep them with scales of so many bits of mantissa, and bytes of a number."""
    grouped = rows.reshape(len(rows), -1, group)
    dropped = 23 - bits
    found = (np.abs(grouped).max(axis=2) / np.float32(127)).view(np.uint32)
    scales = ((found + (1 << dropped) - 1) >> dropped << dropped).view(np.float32)
    spec = MatrixSpec("scales/any", scales.shape[1], "float32", "group")
    n_bytes = rows.size + len(bytes(encode_shard(spec, scales, len(scales))))  # type: ignore[arg-type]
    return (np.rint(grouped / scales[:, :, None]) * scales[:, :, None]).reshape(rows.shape), n_bytes / rows.size


def relative(found: Rows, exact: Rows) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def report_firings(path: Path) -> float:
    """Print bytes of a firing, and return those of the last but one kind.

    Of the embedded world's SAEs; then of 16,384 features, frequent as Zipf's law has it, with activations that lie
    above a threshold, or are random halves, which nothing compresses.
    """
    reader = StoreReader(path)
    for sae in sae_sites(path):
        counts = [len(reader.firings(sae, shard).features) for shard in reader.done(f"firings/{sae}")]
        written = [proof["bytes"] for name, proof in proofs_of(path) if name.startswith(f"firings/{sae}/")]
        print(f"firings of {sae}: {sum(written) / sum(counts):.2f} bytes each")
    shape = Shape()
    drawn = firings_of(0, 0, shape)
    above = 3 + np.random.default_rng(0).exponential(4, len(drawn.features)).astype(np.float32)
    found = {}
    for name, activations in (("exponential", above), ("random halves", drawn.activations)):
        firings = RowFirings(drawn.indptr, drawn.features, round_mantissa(activations, 10))
        found[name] = len(encode_firings(FiringsSpec("generated", shape.features), firings)) / len(drawn.features)
        print(f"firings, about {FIRINGS_PER_ROW} a row, activations {name}: {found[name]:.2f} bytes each")
    return found["exponential"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"machine: {workload.machine()}")
    saes = [str(one) for one in assets().saes if "-res/" in str(one)]
    documents = first_documents(asked.tokens)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        exact = store_of(home, "float32", documents, saes)
        real = real_rows(exact)
        wide = np.random.default_rng(0).standard_normal((SHARD_ROWS, GEMMA_WIDTH), dtype=np.float32)
        for name, rows in (
            ("embedded world, float32", real),
            ("embedded world, bfloat16", real.astype(ml_dtypes.bfloat16)),
            ("random, as wide as Gemma 2 2B, bfloat16", wide.astype(ml_dtypes.bfloat16)),
        ):
            write, read = compare(name, rows, home, asked.rounds)  # of the last: the widest
        for dtype in ("bfloat16", "int8"):
            report_loss(exact, store_of(home, dtype, documents, []), saes)
        report_groups(real, wide)
        print()
        each = report_firings(exact)
    print()
    show(
        [
            Measure("dense write / raw memory-mapped file, bfloat16", write, 0.5, 0.9),
            Measure("whole-shard read / raw memory-mapped file, bfloat16", read, 0.5, 0.7),
            Measure("bytes of a firing, truth", each, 3.3, 3.0, "bytes", less=True),
        ]
    )


if __name__ == "__main__":
    main()
