"""Extraction on whatever device is here, beside the bare forward pass and the disk, with a model of Gemma-2-2B's shape.

python benchmarks/gpu.py [--shape gemma-2-2b|small] [--tokens 98304] [--minutes 8]

Needs no network: random bfloat16 weights, seeded documents of 64 to 1,024 tokens, random 16k JumpReLU SAEs with about
80 firings a row. Without a GPU the shape is small, and the figures say only that the program works. Each line is
printed when it is measured. `ceiling` is min(0.95 · forward, 0.9 · disk / bytes per token): what no extraction of this
kind exceeds; encoding is not in it. Ends with 1 where a measurement failed or the screen was not exact.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import gpu_workload as workload
import torch
from gpu_workload import SHAPES, Shape
from workload import machine, peak_memory_mb

import actstore
from actstore.demo import assets
from actstore.models import LoadedModel, digests, load_model
from actstore.saes import ENCODERS, SaeEncoder, ScreenEncoder, SparseCoder, expand_sae_arguments, load_sae
from actstore.sites import Site

TILE_ROWS = 1024
REFERENCE_ROWS = 2048
COLUMNS = f"{'':<34} {'tokens/s':>9} {'/ forward':>9} {'waited':>7} {'bytes/token':>12} {'ceiling':>9} {'/ ceiling':>9}"


class Tf32Encoder(SaeEncoder):
    """The products of an SAE in TF32: fast on a GPU, and other firings. Only measured, never offered."""

    def _before(self, rows: torch.Tensor, is_narrow: bool) -> torch.Tensor:
        with _tf32():
            return super()._before(rows, is_narrow)


@contextmanager
def _tf32() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@dataclass
class Bench:
    """What all sections share: the model, the text, the SAEs, and the limits measured in this run."""

    home: Path
    shape: Shape
    device: torch.device
    documents: list[str]
    causal_lm: Any
    deadline: float
    model: LoadedModel
    forward_per_second: float = 0.0
    disk_per_second: float = 0.0
    saes: dict[int, str] = field(default_factory=dict)
    has_failed: bool = False

    def section(self, name: str, **asked: Any) -> None:
        """Extract, print the line of it, and delete it."""
        self.attempt(name, partial(self._measure, name, asked))

    def attempt(self, name: str, run: Callable[[], None]) -> None:
        """Run something; where it fails say so and go on; do not begin when time is up."""
        if time.monotonic() > self.deadline:
            print(f"{name:<34} not measured: the time is up (--minutes)", flush=True)
            return
        try:
            run()
        except Exception as error:  # the other sections say more than a program that ended
            self.has_failed = True
            reason = str(error).splitlines() or [""]
            print(f"{name:<34} failed: {type(error).__name__}: {reason[0]}", flush=True)
            traceback.print_exc()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, name: str, asked: Mapping[str, Any]) -> None:
        out = self.home / "measured"
        try:
            self.print_line(name, self.extract(out, **asked), out)
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def extract(self, out: Path, **asked: Any) -> Any:
        """Return the outcome of an extraction; what is made before its loop, and not measured, is left out."""
        with (
            mock.patch("actstore.extraction.opening.kit_writers", return_value={}),
            mock.patch("actstore.extraction.opening.write_feature_logits", return_value={}),
        ):
            return actstore.extract(
                self.causal_lm,
                self.documents,
                tokenizer=str(assets().model),
                out=out,
                context=self.shape.context,
                shard_rows=self.shape.shard_rows,
                predictions=False,
                sae_weights=False,
                device=self.device.type,
                allow_unhealthy=True,
                with_index=False,
                force=True,
                **asked,
            )

    def print_line(self, name: str, outcome: Any, store: Path) -> None:
        speed = outcome.n_rows_made / outcome.seconds
        bytes_per_token = _stored_bytes(store) / outcome.n_rows_made
        ceiling = min(0.95 * self.forward_per_second, 0.9 * self.disk_per_second / bytes_per_token)
        report = getattr(outcome, "report", None)
        waited = "-" if report is None else f"{report.waited_share:.0%}"
        bound = "" if report is None else f"  bound by {report.bound_by}"
        print(
            f"{name:<34} {speed:>9.0f} {speed / self.forward_per_second:>9.2f} {waited:>7} {bytes_per_token:>12.0f} "
            f"{ceiling:>9.0f} {speed / ceiling:>9.2f}{bound}",
            flush=True,
        )


def _stored_bytes(store: Path) -> int:
    files = [path for folder in ("arrays", "firings") for path in (store / folder).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def _synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bare_forward(bench: Bench, store: Path, n_rows: int) -> None:
    """Measure the model alone over the very batches of an extraction, to the end of its last layer, without logits."""
    last = Site("resid_post", bench.shape.n_layers - 1)
    batches = workload.batches_of(store, bench.device)
    for token_ids, mask in [*batches[:2], *batches[-2:]]:  # kernels are chosen when a shape is met first
        bench.model.capture(token_ids, mask, [last], lambda _site, _values: None)
    started = _synchronised(bench.device)
    for token_ids, mask in batches:
        bench.model.capture(token_ids, mask, [last], lambda _site, _values: None)
    bench.forward_per_second = n_rows / (_synchronised(bench.device) - started)
    print(f"{'bare forward, no logits':<34} {bench.forward_per_second:>9.0f} {1:>9.2f}", flush=True)


def exactness(bench: Bench, rows: torch.Tensor) -> None:
    """Compare what fires by each way of multiplying with float64, at the middle layer; raises where the screen errs."""
    coder = load_sae(expand_sae_arguments([bench.saes[bench.shape.middle]])[0])
    exact = _exact_firings(coder, rows[:REFERENCE_ROWS])
    print(f"\n{int(exact.sum())} firings of {len(exact)} rows by float64, and what each encoder has otherwise:")
    wrong = {}
    for name, kind in (("float32", SaeEncoder), ("TF32", Tf32Encoder), ("screen", ScreenEncoder)):
        encoder = kind(coder, bench.device)
        wrong[name] = int((_firings(encoder, rows[:REFERENCE_ROWS]) != exact).sum())
        print(f"{name:<10} {wrong[name]:>8} pairs; alone {_rows_per_second(encoder, rows):>12.0f} rows/s", flush=True)
        if isinstance(encoder, ScreenEncoder):
            largest, n_near = _bound_used(encoder, coder, rows[:TILE_ROWS])
            print(
                f"{'':<10} error of the parts {largest:.4f} of the bound; {n_near:.1f} features a row near", flush=True
            )
    if wrong["screen"]:
        raise RuntimeError(f"the screen has {wrong['screen']} firings otherwise than float64")


def _exact_before(coder: SparseCoder, rows: torch.Tensor) -> torch.Tensor:
    w_enc, b_enc = (torch.from_numpy(array).to(rows.device).double() for array in (coder.w_enc, coder.b_enc))
    return rows.double() @ w_enc + b_enc


def _exact_firings(coder: SparseCoder, rows: torch.Tensor) -> torch.Tensor:
    return _exact_before(coder, rows) > torch.from_numpy(coder.threshold).to(rows.device)


def _firings(encoder: SaeEncoder, rows: torch.Tensor) -> torch.Tensor:
    found = torch.zeros(len(rows), encoder.coder.d_sae, dtype=torch.bool, device=rows.device)
    for first in range(0, len(rows), TILE_ROWS):
        tile = encoder.encode(rows[first : first + TILE_ROWS])
        row = torch.repeat_interleave(torch.arange(len(tile.counts), device=rows.device), tile.counts)
        found[first + row, tile.features.long()] = True
    return found


def _rows_per_second(encoder: SaeEncoder, rows: torch.Tensor) -> float:
    tiles = torch.split(rows, TILE_ROWS)
    encoder.encode(tiles[0])
    started = _synchronised(rows.device)
    for tile in tiles:
        encoder.encode(tile)
    return len(rows) / (_synchronised(rows.device) - started)


def _bound_used(encoder: ScreenEncoder, coder: SparseCoder, rows: torch.Tensor) -> tuple[float, float]:
    """Return the largest share of the bound that an error takes, and how many features of a row are decided again."""
    before, bound = encoder.screened(rows.float(), is_narrow=True)
    error = (before.double() - _exact_before(coder, rows)).abs() / bound
    threshold = torch.from_numpy(coder.threshold).to(rows.device)
    return float(error.max()), float(((before - threshold).abs() <= bound).sum(dim=1).float().mean())


def run(bench: Bench) -> None:
    """Measure everything, the cheapest first."""
    shape, base = bench.shape, bench.home / "base"
    middle, everywhere = f"resid_post.{shape.middle}", "resid_post.*"
    first = bench.extract(base, sites=[middle])  # its layout is what the bare forward pass runs
    bench.disk_per_second = workload.disk_bytes_per_second(bench.home, shape.disk_bytes)
    print(f"disk: {bench.disk_per_second / 1e6:.0f} MB/s written and made durable; {first.n_rows_made} tokens")
    print(COLUMNS)
    bare_forward(bench, base, first.n_rows_made)
    bench.print_line(f"dense, layer {shape.middle} (stops there)", first, base)
    batches = workload.batches_of(base, bench.device)
    shutil.rmtree(base)
    bench.section(f"dense, {shape.n_layers} layers, bf16", sites=[everywhere])
    bench.attempt("SAEs' files", partial(make_saes, bench, batches[0]))
    if bench.saes:
        measure_saes(bench)
    bench.section("attention, top 8", attention_top=8)
    bench.section(f"dense, {shape.n_layers} layers, int8", sites=[everywhere], storage_dtype="int8")
    if bench.saes:
        # Other rows than the thresholds are made from, where there are any.
        rows = workload.first_rows(bench.model, batches[1 % len(batches)], shape.middle)
        bench.attempt("exactness", partial(exactness, bench, rows))


def make_saes(bench: Bench, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write the SAEs of all layers."""
    bench.saes = dict(workload.sae_files(bench.home / "saes", bench.shape, bench.model, batch))


def measure_saes(bench: Bench) -> None:
    """Measure one SAE, and those of all layers by each way of multiplying."""
    shape = bench.shape
    bench.section(f"SAE, layer {shape.middle} (stops there)", saes=[bench.saes[shape.middle]])
    for label, precision, encoder in (
        ("screen", "screen", ScreenEncoder),
        ("float32", "float32", SaeEncoder),
        ("TF32", "float32", Tf32Encoder),
    ):
        with mock.patch.dict(ENCODERS, {precision: encoder}):
            name = f"SAEs, {shape.n_layers} layers, {label}"
            bench.section(name, saes=list(bench.saes.values()), sae_precision=precision)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="by default gemma-2-2b on a GPU, else small")
    parser.add_argument("--tokens", type=int, help="at least so many")
    parser.add_argument("--minutes", type=float, default=8.0, help="no section begins later")
    parser.add_argument("--folder", type=Path, help="where to write [the system's temporary folder]")
    asked = parser.parse_args()
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[asked.shape or ("gemma-2-2b" if device.type == "cuda" else "small")]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"machine: {gpu}; {machine()}; torch {torch.__version__}", flush=True)
    causal_lm = workload.make_model(shape, device)
    with (
        tempfile.TemporaryDirectory(dir=asked.folder) as home,
        # The same weights are digested once, not for each extraction.
        mock.patch("actstore.models.in_memory.digest_of_tensors", cache(digests.digest_of_tensors)),
    ):
        documents = workload.documents(shape, asked.tokens or shape.n_tokens)
        deadline = started + 60 * asked.minutes
        bench = Bench(Path(home), shape, device, documents, causal_lm, deadline, load_model(causal_lm))
        run(bench)
    peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else 0
    print(
        f"\npeak memory {peak_memory_mb():.0f} MB, on the GPU {peak:.0f} MB; {time.monotonic() - started:.0f} s in all"
    )
    return int(bench.has_failed)


if __name__ == "__main__":
    sys.exit(main())
