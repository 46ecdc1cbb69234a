"""Killed at any moment, an extraction resumes: nothing finished is lost or made again, and the end is the same."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from process_support import count_operations, start_extraction
from store_support import finished, index_content, truth
from tiny_world import extract

from actstore import maintenance
from actstore.store import StoreReader

N_MOMENTS = 15  # between operations of the file system, and as many at any time
SIGKILLED = -9

Proof = dict[str, tuple[int, int]]


def finished_files(store: Path) -> Proof:
    """Return every file that a receipt names, with its inode and time of change: it must stay this very file."""
    if not (store / "layout.json").exists():
        return {}
    reader = StoreReader(store)
    names = {name for receipts in reader.receipts.values() for one in receipts.values() for name in one["files"]}
    return {name: ((store / name).stat().st_ino, (store / name).stat().st_mtime_ns) for name in names}


def stage(store: Path) -> str:
    """Return how far an extraction had come."""
    if not (store / "layout.json").exists():
        return "before the corpus was stored"
    if not StoreReader(store).passes:
        return "before the pass began"
    if not list(store.glob("passes/*/sealed-0.json"))[1:]:
        return "shards"
    return "indexing" if not (store / "index/CURRENT").exists() else "complete"


def resume_and_compare(store: Path, kept: Proof) -> None:
    """Check what a killed run left, finish it, and compare everything with a run that nothing disturbed."""
    if (store / "store.json").exists():
        assert maintenance.verify(store).faults == []
    outcome = extract(store)
    assert outcome.complete
    assert {name: proof for name, proof in finished_files(store).items() if name in kept} == kept
    assert outcome.n_shards_made * len(StoreReader(finished()).receipts) == n_shards() - n_shards_of(kept)
    assert truth(store) == truth(finished())
    assert index_content(store) == index_content(finished())
    maintenance.collect_garbage(store)
    found = maintenance.verify(store)
    assert (found.faults, found.orphans) == ([], [])


def n_shards() -> int:
    return StoreReader(finished()).layout.n_shards


def n_shards_of(files: Proof) -> int:
    return len({Path(name).name for name in files if name.startswith("firings/") and "logits" not in name})


@pytest.mark.slow
def test_killed_between_any_two_operations(tmp_path: Path) -> None:
    n_operations = count_operations(tmp_path / "counted")
    random = np.random.default_rng(11)
    stages = set()
    for number in range(N_MOMENTS):
        store = tmp_path / f"{number}.act"
        moment = int((number + random.random()) * n_operations / N_MOMENTS) + 1
        process = start_extraction(store, dies_at=moment)
        process.join()
        assert process.exitcode == SIGKILLED, f"operation {moment} of {n_operations}"
        stages.add(stage(store))
        resume_and_compare(store, finished_files(store))
    assert stages >= {"before the corpus was stored", "shards", "indexing"}


@pytest.mark.slow
def test_killed_at_any_time(tmp_path: Path) -> None:
    started = time.monotonic()
    undisturbed = start_extraction(tmp_path / "timed")
    undisturbed.join()
    seconds = time.monotonic() - started
    assert undisturbed.exitcode == 0
    random = np.random.default_rng(12)
    n_killed = 0
    for number in range(N_MOMENTS):
        store = tmp_path / f"{number}.act"
        started = time.monotonic()
        process = start_extraction(store)
        process.join((number + random.random()) * seconds / N_MOMENTS)
        process.kill()
        process.join()
        if process.exitcode == SIGKILLED:
            n_killed += 1
        else:  # it had ended: the machine is faster than when the run was timed
            seconds = min(seconds, time.monotonic() - started)
        resume_and_compare(store, finished_files(store))
    assert n_killed >= N_MOMENTS // 2


@pytest.mark.slow
def test_killed_again_and_again_on_the_way(tmp_path: Path) -> None:
    store = tmp_path / "s.act"
    moments = [count_operations(tmp_path / "counted") // 2, *np.random.default_rng(13).integers(10, 60, 7).tolist()]
    kept: Proof = {}
    for moment in moments:
        process = start_extraction(store, dies_at=moment)
        process.join()
        assert process.exitcode == SIGKILLED
        now = finished_files(store)
        assert {name: proof for name, proof in now.items() if name in kept} == kept
        kept = now
    assert kept
    resume_and_compare(store, kept)
