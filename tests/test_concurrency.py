"""Several processes and one store: every shard is made once, the dead are replaced, the living are respected."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_support import start_extraction
from store_support import copy_of_finished, extract_some, finished, index_content, truth
from tiny_world import extract

from actstore import maintenance
from actstore.errors import StoreBusy
from actstore.sealed import unseal
from actstore.store import PassWriter, StoreReader, StoreWriter, exclusive
from actstore.store.claims import STALE_SECONDS, claim

SECONDS = 60.0  # more than any process here needs


def passing(store: Path) -> PassWriter:
    writer = StoreWriter.open(store)
    return PassWriter(writer, writer.layout.passes[0])


def shards_made(store: Path) -> Counter[int]:
    """Return how often each shard was made, by the journals of all runs."""
    lines = [line for path in (store / "journal").iterdir() for line in path.read_bytes().splitlines(keepends=True)]
    events = [unseal(line, "journal") for line in lines]
    return Counter(event["shard"] for event in events if event["event"] == "shard")


def all_shards() -> range:
    return range(StoreReader(finished()).layout.n_shards)


def write_claim(path: Path, *, host: str, pid: int, started: str | None, age_seconds: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": host, "pid": pid, "started": started}))
    os.utime(path, (time.time() - age_seconds,) * 2)


# Claims


@pytest.fixture
def claim_path(tmp_path: Path) -> Path:
    return tmp_path / "claims/pass/7.json"


def test_a_claim_is_given_to_one_and_then_to_the_next(tmp_path: Path, claim_path: Path) -> None:
    first = claim(claim_path, tmp_path)
    assert first is not None
    with first:
        assert claim(claim_path, tmp_path) is None
    assert not claim_path.exists()

    assert claim(claim_path, tmp_path) is not None


def test_the_claim_of_a_living_process_is_respected(tmp_path: Path, claim_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        write_claim(claim_path, host=socket.gethostname(), pid=other.pid, started=started, age_seconds=10**6)
        assert claim(claim_path, tmp_path) is None
        other.kill()
        other.wait()
        assert claim(claim_path, tmp_path) is not None, "and taken over as soon as it is dead"


def test_the_claim_of_a_dead_process_is_taken_over_at_once(tmp_path: Path, claim_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        started = Path(f"/proc/{gone.pid}/stat").read_text().rpartition(")")[2].split()[19]
    write_claim(claim_path, host=socket.gethostname(), pid=gone.pid, started=started)

    assert claim(claim_path, tmp_path) is not None
    assert json.loads(claim_path.read_bytes())["pid"] == os.getpid()


def test_a_process_that_has_the_number_of_a_dead_one_does_not_inherit_its_claim(
    tmp_path: Path, claim_path: Path
) -> None:
    write_claim(claim_path, host=socket.gethostname(), pid=os.getpid(), started="1")

    assert claim(claim_path, tmp_path) is not None


@pytest.mark.parametrize(
    ("age_seconds", "given"),
    [(0.0, False), (STALE_SECONDS - 10, False), (STALE_SECONDS + 10, True)],
    ids=["fresh", "quiet", "stale"],
)
def test_the_claim_of_another_host_counts_while_it_is_touched(
    tmp_path: Path, claim_path: Path, age_seconds: float, given: bool
) -> None:
    write_claim(claim_path, host="elsewhere", pid=os.getpid(), started="1", age_seconds=age_seconds)

    assert (claim(claim_path, tmp_path) is not None) == given


def test_a_claim_that_was_cut_is_nobodys(tmp_path: Path, claim_path: Path) -> None:
    claim_path.parent.mkdir(parents=True)
    claim_path.write_bytes(b"")

    assert claim(claim_path, tmp_path) is not None


def test_a_claim_beats_while_it_is_held(tmp_path: Path, claim_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actstore.store.claims.HEARTBEAT_SECONDS", 0.01)
    held = claim(claim_path, tmp_path)
    assert held is not None
    os.utime(claim_path, (0, 0))
    with held:
        deadline = time.monotonic() + SECONDS
        while claim_path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - claim_path.stat().st_mtime < SECONDS


# The lock


@pytest.mark.parametrize("change", [lambda root: maintenance.drop(root, "predictions"), lambda root: extract(root)])
def test_who_would_change_the_layout_waits_and_then_says_that_the_store_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object
) -> None:
    store = copy_of_finished(tmp_path)
    assert callable(change)
    wait = exclusive

    def impatient(root: Path, name: str = "lock", *, wait_seconds: float = 60.0) -> object:
        return wait(root, name, wait_seconds=min(wait_seconds, 0.2))

    monkeypatch.setattr("actstore.maintenance.exclusive", impatient)
    monkeypatch.setattr("actstore.extraction.run.exclusive", impatient)
    with exclusive(store), pytest.raises(StoreBusy, match="run the same command again"):
        change(store)

    assert truth(store) == truth(finished())


def test_a_lock_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from actstore.store import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StoreBusy), exclusive(tmp_path, wait_seconds=0.1):
            pass
        holder.kill()
    with exclusive(tmp_path, wait_seconds=SECONDS):
        pass


# Whole extractions


@pytest.mark.slow
def test_three_processes_make_every_shard_once_and_the_same_store(tmp_path: Path) -> None:
    store = tmp_path / "s.act"
    workers = [start_extraction(store) for _ in range(3)]
    for worker in workers:
        worker.join(SECONDS)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]

    assert shards_made(store) == Counter(all_shards())
    assert truth(store) == truth(finished())
    assert index_content(store) == index_content(finished())
    found = maintenance.verify(store)
    assert (found.faults, [name for name in found.orphans if not name.startswith("index/")]) == ([], [])


@pytest.mark.slow
def test_three_processes_go_on_when_one_of_them_is_killed(tmp_path: Path) -> None:
    store = tmp_path / "s.act"
    extract_some(store, 1)
    victim = start_extraction(store, dies_at=60)
    others = [start_extraction(store) for _ in range(2)]
    for worker in (victim, *others):
        worker.join(SECONDS)
    assert [worker.exitcode for worker in others] == [0, 0]

    assert victim.exitcode in (-9, 0)
    assert max(shards_made(store).values()) == 1
    assert truth(store) == truth(finished())


@pytest.mark.slow
def test_who_finds_a_shard_claimed_makes_the_others_and_waits_for_it(tmp_path: Path) -> None:
    store = tmp_path / "s.act"
    extract_some(store, 1)
    held = passing(store).claim(2)
    assert held is not None
    with held:
        worker = start_extraction(store, with_index=False)
        deadline = time.monotonic() + SECONDS
        while passing(store).pending() != [2] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert passing(store).pending() == [2]
        worker.join(1.0)
        assert worker.is_alive(), "it waits"
    worker.join(SECONDS)
    assert worker.exitcode == 0

    assert shards_made(store)[2] == 1
    assert truth(store) == truth(finished())


def test_a_store_that_another_process_makes_while_its_directory_is_listed_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = Path.iterdir

    def appearing(path: Path) -> Iterator[Path]:
        (path / "store.json").write_text("{}")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", appearing)
    assert StoreWriter.prepare(tmp_path / "s.act")
