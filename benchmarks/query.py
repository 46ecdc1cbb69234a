"""Latency of the headline questions over generated stores, each answer compared with numpy over what was generated.

python benchmarks/query.py [--firings 12e6] [--large] [--times 60] [--keep DIRECTORY]

Every size is a store of its own, in a temporary directory: one SAE of 16,384 features at about 80 firings on a row;
then 26 such SAEs whose index has four parts each. `--large` asks stores of 100 and 1,000 million firings instead, for
which 8 GB of disk are used meanwhile. `same` asks one question again and again, `other` another feature, row or
document each time, of a store that has answered some already; `cold` the first question of a store that has just been
opened, with its files out of the system's cache. `new process` is a Python that imports actstore, opens the store and
asks once; its files are in the cache. What has a target is asked in four rounds, and the calmest counts.
benchmarks/lens.py tells what a logit lens takes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import workload
from generated import Shape, feature_firings, firings_of, generate, sae_name, snippet_of
from measures import Measure, show

import actstore

LARGE = (100e6, 1e9)
UNUSUAL = 500e6  # firings: from here on the only target is that of a feature's strongest
MANY = Shape(firings=320e3, saes=26, parts=4, shard_rows=1024)
N_TOP, PROVED, COLD_TIMES, ROUNDS = 20, 4, 5, 4
CONTRACT = (
    "SELECT t.token, snippet(a.row, 10, 10) AS example, a.activation FROM activations a JOIN tokens t USING (row) "
    "WHERE a.sae = $sae AND a.feature = $feature ORDER BY a.activation DESC LIMIT 20"
)
COLD = """import actstore
answer = actstore.open({path!r}).query('max_activating', {{'sae': {sae!r}, 'feature': {feature}}})
print(len(answer.rows()), flush=True)"""

Ask = Callable[[Any], Any]
Spread = tuple[float, float]  # p50 and p95


@dataclass(frozen=True)
class Question:
    """A question with the milliseconds that it must stay below, and those that it should; None: no target."""

    name: str
    floor: float | None
    aim: float | None
    ask: Ask
    subjects: npt.NDArray[np.int64]  # what it is asked about: features, rows or documents


def questions(store: actstore.api.Store, shape: Shape) -> list[Question]:
    """Return the questions of one store; the floor of the first depends on the size."""
    sae, random = sae_name(shape.saes // 2), np.random.default_rng(0)
    features = random.permutation(shape.features)
    rows, docs = some_rows(shape, random), random.permutation(store.reader.layout.n_docs)
    floor, aim = next((pair for most, *pair in ((50e6, 3, 1.5), (500e6, 4, 1.5)) if shape.firings < most), (10, 3))
    is_usual = shape.firings < UNUSUAL
    top = Question("top 20 and windows of a feature", floor, aim, top_of(store, sae), features)
    if shape.saes > 1:
        return [top, Question("contract's SQL example", 8, 3, contract_of(store, sae), features)]
    statistics, examples = "SELECT * FROM features WHERE sae = ?", "SELECT * FROM examples WHERE sae = ? AND rank <= ?"
    return [
        top,
        Question("contract's SQL example", None, None, contract_of(store, sae), features),
        Question("top 20 of all features", 500, 50, lambda _: store.sql(examples, [sae, N_TOP]), features[:1]),
        Question("statistics of all features", 50, 10, lambda _: store.sql(statistics, [sae]), features[:1]),
        Question(
            "features on a row",
            5 if is_usual else None,
            1 if is_usual else None,
            lambda row: store.query("token_features", {"sae": sae, "row": row}),
            rows,
        ),
        Question(
            "features of a document",
            10 if is_usual else None,
            3 if is_usual else None,
            lambda doc: store.query("document_features", {"sae": sae, "doc": doc}),
            docs,
        ),
    ]


def contract_of(store: actstore.api.Store, sae: str) -> Ask:
    """Return the example of the SQL contract, for a feature."""
    return lambda feature: store.sql(CONTRACT, {"sae": sae, "feature": feature})


def top_of(store: actstore.api.Store, sae: str) -> Ask:
    """Return the question for a feature's strongest firings, each in its context."""
    return lambda feature: store.query("max_activating", {"sae": sae, "feature": feature, "k": N_TOP})


def some_rows(shape: Shape, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return rows in use, of at most four shards: as many as a reader keeps."""
    shards, places = random.integers(0, min(4, shape.n_shards), 500), random.integers(1, shape.rows_used, 500)
    return np.asarray(shards * shape.shard_rows + places)


def prove(store: actstore.api.Store, shape: Shape) -> None:
    """Compare answers with numpy over what was generated; raises AssertionError."""
    number = shape.saes // 2
    sae = sae_name(number)
    for feature in np.random.default_rng(1).permutation(shape.features)[:PROVED].tolist():
        rows, activations = feature_firings(number, feature, shape)
        order = np.lexsort((rows, -activations))[:N_TOP]
        top = store.query("max_activating", {"sae": sae, "feature": feature, "k": N_TOP}).rows()
        assert [one["row"] for one in top] == rows[order].tolist()
        assert [one["activation"] for one in top] == activations[order].tolist()
        assert [one["example"] for one in top] == [snippet_of(row, 10, 10, shape) for row in rows[order].tolist()]
        contract = store.sql(CONTRACT, {"sae": sae, "feature": feature}).rows()
        assert [one["activation"] for one in contract] == activations[order].tolist()
        said = store.sql("SELECT * FROM features WHERE sae = ? AND feature = ?", [sae, feature]).rows()[0]
        assert (said["n_firings"], said["max_activation"]) == (len(rows), activations.max(initial=0))
        ranked = store.sql("SELECT row FROM examples WHERE sae = ? AND feature = ? ORDER BY rank", [sae, feature])
        assert np.asarray(ranked.table["row"])[:N_TOP].tolist() == rows[order].tolist()
    prove_rows(store, shape, number)


def prove_rows(store: actstore.api.Store, shape: Shape, number: int) -> None:
    """Compare the features on a row, and of the document that it begins, with what was generated."""
    sae, firings = sae_name(number), firings_of(number, 0, shape)
    on_row = slice(*firings.indptr[1:3])
    answer = store.query("token_features", {"sae": sae, "row": 1, "k": 200}).table
    order = np.lexsort((firings.features[on_row], -firings.activations[on_row]))
    assert np.asarray(answer["feature"]).tolist() == firings.features[on_row][order].tolist()
    doc = store.query("document_features", {"sae": sae, "doc": 0, "k": shape.features}).table
    n_rows = np.bincount(firings.features[: firings.indptr[200]], minlength=shape.features)
    assert np.array_equal(np.asarray(doc["n_rows"]), n_rows[np.asarray(doc["feature"])])
    assert doc.num_rows == np.count_nonzero(n_rows)


def cold_milliseconds(path: Path, shape: Shape, n_questions: int) -> Iterator[Spread]:
    """Yield p50 and p95 of every question, asked first of a store whose files the system has to read again."""
    for number in range(n_questions):
        taken = []
        for place in range(COLD_TIMES):
            forget(path)
            with actstore.open(path) as store:
                store.sql("SELECT 1")
                one = questions(store, shape)[number]
                taken.append(milliseconds(one.ask, one.subjects[place : place + 1], 1)[0])
        yield percentiles(taken)


def forget(path: Path) -> None:
    """Drop a store's files from the system's cache."""
    for file in path.rglob("*"):
        if file.is_file():
            opened = os.open(file, os.O_RDONLY)
            os.fdatasync(opened)  # what is not written yet would stay
            os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(opened)


def percentiles(taken: list[float]) -> Spread:
    return float(np.percentile(taken, 50)), float(np.percentile(taken, 95))


def calmest(ask: Ask, subjects: npt.NDArray[np.int64], times: int) -> Spread:
    """Return the spread of the round with the least p50: what others do with the cores only adds to it."""
    return min(milliseconds(ask, np.roll(subjects, -turn * times), times) for turn in range(ROUNDS))


def milliseconds(ask: Ask, subjects: npt.NDArray[np.int64], times: int) -> Spread:
    """Return p50 and p95 of asking about one subject after the other, after some that are not counted."""
    asked = np.resize(subjects, times + times // 4).tolist()
    taken = []
    for subject in asked:
        started = time.perf_counter()
        ask(subject)
        taken.append(1000 * (time.perf_counter() - started))
    return percentiles(taken[times // 4 :])


def report(path: Path, shape: Shape, times: int) -> Iterator[Measure]:
    """Print a line for each question of a store; yield what has a target."""
    with actstore.open(path) as store:
        prove(store, shape)
        name = f"{shape.firings * shape.saes / 1e6:.0f} M firings" + (f", {shape.saes} SAEs" if shape.saes > 1 else "")
        asked = questions(store, shape)
        same = [calmest(one.ask, one.subjects[:1], times) for one in asked]
        other = [calmest(one.ask, one.subjects, times) if len(one.subjects) > 1 else None for one in asked]
    cold = cold_milliseconds(path, shape, len(asked))
    for one, again, another, first in zip(asked, same, other, cold, strict=True):
        yield from line(name, one.name, one.floor, one.aim, again, another, first)
    nothing = np.zeros(1, np.int64)
    yield from line(name, "open, warm", None, None, milliseconds(lambda _: opened(path), nothing, 10))
    program = COLD.format(path=str(path), sae=sae_name(0), feature=7)
    # Of many parts, each has a file to be opened.
    floor, aim = (600, 300) if shape.saes == 1 and shape.firings < UNUSUAL else (None, None)
    for said, ends, targets in (("top 20", False, (floor, aim)), ("top 20, and its end", True, (None, None))):
        taken = min(percentiles([new_process(program, ends) for _ in range(COLD_TIMES)]) for _ in range(ROUNDS))
        yield from line(name, f"new process: {said}", *targets, taken)


def new_process(program: str, ends: bool) -> float:
    """Return the milliseconds from the start of a Python until it prints its answer, or until it has ended."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == N_TOP
        answered = time.perf_counter()
    assert process.returncode == 0
    return 1000 * ((time.perf_counter() if ends else answered) - started)


def opened(path: Path) -> None:
    """Open a store and its index, and close it."""
    with actstore.open(path) as store:
        store.sql("SELECT 1")


def line(
    size: str, name: str, floor: float | None, aim: float | None, same: Spread, *others: Spread | None
) -> Iterator[Measure]:
    """Print a line of the table; yield it where it has a target."""
    targets = "".join(f"{'' if value is None else f'{value:g}':>7}" for value in (floor, aim))
    figures = "".join("{:>9.2f}{:>9.2f}".format(*one) if one else " " * 18 for one in (same, *others))
    print(f"{size:<22}{name:<34}{targets}{figures}", flush=True)
    if floor is not None and aim is not None:
        yield Measure(f"{name}, {size}", same[0], floor, aim, "ms", less=True)


@contextmanager
def home(keep: Path | None) -> Iterator[Path]:
    """Yield a directory for stores: `keep`, whose stores are used again, or a temporary one."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def made(folder: Path, shape: Shape) -> Path:
    """Return the store of a shape, made where it is not there."""
    path = folder / f"{shape.saes}x{shape.firings:.0f}.act"
    if not (path / "index" / "CURRENT").exists():
        started = time.perf_counter()
        generate(path, shape)
        print(f"# {path.name}: written and indexed in {time.perf_counter() - started:.0f} s", flush=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--firings", type=float, nargs="+", default=[Shape.firings])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--times", type=int, default=60)
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    shapes = [Shape(firings=size) for size in LARGE] if asked.large else [*map(Shape, asked.firings), MANY]
    print(f"machine: {workload.machine()}")
    print(
        f"{'size':<22}{'milliseconds':<34}{'floor':>7}{'aim':>7}{'same p50':>9}{'p95':>9}"
        f"{'other p50':>9}{'p95':>9}{'cold p50':>9}{'p95':>9}"
    )
    found: list[Measure] = []
    for shape in shapes:
        with home(asked.keep) as folder:
            found += report(made(folder, shape), shape, asked.times)
    show(found)


if __name__ == "__main__":
    main()
