"""A shard is written while the next is made; whatever ends a run, what was made before it is finished and kept."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from store_support import finished, truth
from tiny_world import extract

import actstore
import actstore.store
from actstore.blocks import ShardBlock
from actstore.errors import ActstoreError
from actstore.extraction.memory import keep_freed_memory
from actstore.extraction.runner import ShardRunner
from actstore.info import describe
from actstore.sealed import read_sealed
from actstore.store import Journal, PassWriter, StoreReader, last_runs, read_runs
from actstore.store.journal import JournalledRun

N_SHARDS = 6
SECONDS = 30.0  # until what never comes is given up


class Watched:
    """An extraction whose shards tell when their making and their writing begin; either may be made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        self.makes: Callable[[int], None] = lambda _: None
        self.writes: Callable[[int], None] = lambda _: None
        started = {shard: threading.Event() for shard in range(N_SHARDS + 1)}
        self.started = started
        make, commit = ShardRunner.start, PassWriter.commit

        def watched_make(runner: ShardRunner, shard: Any) -> Any:
            self.events.append(("made", shard.shard))
            started[shard.shard].set()
            self.makes(shard.shard)
            return make(runner, shard)

        def watched_commit(passing: PassWriter, block: ShardBlock) -> int:
            self.writes(block.shard)
            n_bytes = commit(passing, block)
            self.events.append(("written", block.shard))
            return n_bytes

        monkeypatch.setattr(ShardRunner, "start", watched_make)
        monkeypatch.setattr(PassWriter, "commit", watched_commit)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def receipts(store: Path) -> set[int]:
    (of_pass,) = StoreReader(store).receipts.values()
    return set(of_pass)


def claims(store: Path) -> list[Path]:
    return list((store / "claims").rglob("*.json"))


def fails(at: int, error: BaseException) -> Callable[[int], None]:
    def fail(shard: int) -> None:
        if shard == at:
            raise error

    return fail


def test_a_shard_is_written_while_the_next_is_made(tmp_path: Path, watched: Watched) -> None:
    def until_the_next_has_begun(shard: int) -> None:
        assert shard == N_SHARDS - 1 or watched.started[shard + 1].wait(SECONDS)

    watched.writes = until_the_next_has_begun
    outcome = extract(tmp_path / "store")
    assert outcome.complete and outcome.n_shards_made == N_SHARDS
    assert truth(tmp_path / "store") == truth(finished())


def test_never_more_than_two_shards_are_in_memory(tmp_path: Path, watched: Watched) -> None:
    extract(tmp_path / "store")
    made = written = most = 0
    for event, _ in watched.events:
        made, written = made + (event == "made"), written + (event == "written")
        most = max(most, made - written)
    assert made == written == N_SHARDS
    assert most == 2


def test_shards_are_written_in_their_order_by_one_process(tmp_path: Path, watched: Watched) -> None:
    extract(tmp_path / "store")
    assert [shard for event, shard in watched.events if event == "written"] == list(range(N_SHARDS))


@pytest.mark.parametrize("error", [RuntimeError("the kernel is broken"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_what_was_made_before_the_work_ends_is_written(tmp_path: Path, watched: Watched, error: BaseException) -> None:
    watched.makes = fails(3, error)
    with pytest.raises(type(error)):
        extract(tmp_path / "store")
    assert receipts(tmp_path / "store") == {0, 1, 2}
    assert claims(tmp_path / "store") == []
    watched.makes = lambda _: None
    assert extract(tmp_path / "store").n_shards_made == N_SHARDS - 3
    assert truth(tmp_path / "store") == truth(finished())


@pytest.mark.parametrize("shard", [0, 2, N_SHARDS - 1], ids=["first", "middle", "last"])
def test_a_shard_that_cannot_be_written_ends_the_run_and_has_no_receipt(
    tmp_path: Path, watched: Watched, shard: int
) -> None:
    watched.writes = fails(shard, ActstoreError("the disk is on fire"))
    with pytest.raises(ActstoreError, match="on fire"):
        extract(tmp_path / "store")
    assert receipts(tmp_path / "store") == set(range(shard))
    assert claims(tmp_path / "store") == []
    watched.writes = lambda _: None
    assert extract(tmp_path / "store").complete
    assert truth(tmp_path / "store") == truth(finished())


def test_a_file_that_cannot_be_written_keeps_its_shard_from_a_receipt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = actstore.store.prove_and_write

    def failing(root: Path, name: str, *rest: Any) -> Any:
        if name.startswith("firings/") and name.endswith("/1.zip"):
            raise ActstoreError("no more of this")
        return write(root, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr("actstore.store.passes.prove_and_write", failing)
        with pytest.raises(ActstoreError, match="no more"):
            extract(tmp_path / "store")
    assert receipts(tmp_path / "store") == {0}
    assert extract(tmp_path / "store").complete


def test_a_run_says_how_it_went(tmp_path: Path) -> None:
    outcome = extract(tmp_path / "store")
    report, reader = outcome.report, StoreReader(tmp_path / "store")
    files = [
        proof for of_pass in reader.receipts.values() for one in of_pass.values() for proof in one["files"].values()
    ]
    assert report.written_bytes == sum(proof["bytes"] for proof in files)
    assert report.n_rows == outcome.n_rows_made == reader.layout.n_rows
    assert set(report.work_seconds) == {"forward", "encode", "read-out"}
    assert 0 < sum(report.work_seconds.values()) <= report.seconds
    assert report.waited_share == pytest.approx(1 - sum(report.work_seconds.values()) / report.seconds)
    assert report.peak_memory_bytes > 1 << 20 and report.peak_device_memory_bytes is None
    assert report.bound_by in {"disk", *report.work_seconds}


def test_info_shows_how_the_last_run_of_a_pass_went(tmp_path: Path) -> None:
    report = extract(tmp_path / "store").report
    with actstore.open(tmp_path / "store") as store:
        described = describe(store)
    assert list(described.runs.values()) == [[report]]
    assert f"last run: {report.rows_per_second:.0f} tokens/s, bound by {report.bound_by}" in str(described)


def test_a_run_that_made_nothing_says_nothing_and_the_last_that_did_is_shown(tmp_path: Path) -> None:
    report = extract(tmp_path / "store").report
    assert extract(tmp_path / "store").report is None
    with actstore.open(tmp_path / "store") as store:
        assert list(describe(store).runs.values()) == [[report]]


def test_info_shows_every_process_of_the_last_run(tmp_path: Path) -> None:
    report, store = extract(tmp_path / "store").report, tmp_path / "store"
    (pass_id,) = StoreReader(store).passes
    journals = [Journal(store) for _ in range(3)]
    for journal in journals[:2]:
        journal.write("begin", pass_id=pass_id)
    for number, journal in enumerate(journals[:2]):  # both were at work at once, later than the run before
        journal.write("end", pass_id=pass_id, report=replace(report, n_rows=1000 + number).to_json())
    journals[2].write("begin", pass_id=pass_id)  # and one that was killed
    with actstore.open(store) as opened:
        described = describe(opened)
    assert [one.n_rows for one in described.runs[pass_id]] == [1000, 1001]
    assert "last run: 2 processes at once, 2001 tokens together\n    1000 tokens of one: " in str(described)
    assert [one["n_rows"] for one in described.to_json()["runs"][pass_id]] == [1000, 1001]


@pytest.mark.parametrize(
    ("spans", "last"),
    [
        pytest.param([(0, 10)], [0], id="one"),
        pytest.param([(0, 10), (10, 20)], [1], id="one after another"),
        pytest.param([(0, 10), (9, 20)], [0, 1], id="at once"),
        pytest.param([(0, 12), (11, 21), (20, 30)], [0, 1, 2], id="each with the next"),
        pytest.param([(20, 30), (0, 5), (4, 21)], [1, 2, 0], id="in the order of their ends"),
        pytest.param([(0, 5), (6, 30), (7, 9), (8, 10)], [2, 3, 1], id="within one"),
    ],
)
def test_the_last_run_of_a_pass_is_what_was_at_work_at_once(spans: list[tuple[float, float]], last: list[int]) -> None:
    def run(number: int, pass_id: str, report: dict[str, int] | None) -> JournalledRun:
        began, ended = spans[number]
        return JournalledRun(pass_id, "host", number, began, ended, report)

    runs = [run(number, "a", {"n_rows": 1}) for number in range(len(spans))]
    runs += [run(number, "b", None) for number in range(len(spans))]  # no report: it says nothing
    assert {one: [run.pid for run in found] for one, found in last_runs(runs).items()} == {"a": last}


def test_runs_of_the_journal_are_read_from_a_time_on(tmp_path: Path) -> None:
    outcome = extract(tmp_path / "store")
    location = StoreReader(tmp_path / "store").location
    (run,) = read_runs(location)
    assert run.pid == os.getpid() and run.began < run.ended
    assert run.report == outcome.report.to_json() and outcome.report.n_rows == outcome.n_rows_made
    assert list(read_runs(location, since=run.began)) == [run]
    assert list(read_runs(location, since=run.began + 2)) == []


def test_the_journal_names_every_shard_with_its_time(tmp_path: Path) -> None:
    extract(tmp_path / "store")
    (journal,) = (tmp_path / "store" / "journal").glob("*.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    (tmp_path / "line").write_bytes(lines[1])
    event = read_sealed(tmp_path / "line")
    assert (event["event"], event["shard"]) == ("shard", 0) and event["write_seconds"] > 0
    assert len(lines) == N_SHARDS + 2


@pytest.mark.skipif(not os.confstr("CS_GNU_LIBC_VERSION"), reason="only glibc gives large blocks back")
def test_large_blocks_are_kept_by_the_c_library() -> None:
    assert keep_freed_memory()
