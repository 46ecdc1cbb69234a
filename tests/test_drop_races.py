"""Drop, gc and a run that has not claimed anything yet: who begins a pass is respected from then until it is sealed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest
from encode_support import stored
from race_support import RUNS, begun, goes_on
from store_support import hashes, home, truth
from tiny_world import tiny_world

from actstore import maintenance
from actstore.errors import StoreBusy, UnknownName
from actstore.store import StoreReader, exclusive


@cache
def of_sites() -> Path:
    """Return a store of sites alone, without an index, that nobody may change."""
    return stored(home() / "races.act", sites=["resid_post.1", "resid_post.2"], with_index=False)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return Path(shutil.copytree(of_sites(), tmp_path / "copy.act"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_neither_drop_nor_gc_gets_in_between_the_beginning_of_a_pass_and_its_seal(store: Path, kind: str) -> None:
    _, artifact = RUNS[kind]
    with begun(kind, store) as (_, line):
        before = hashes(store)
        with pytest.raises(StoreBusy):
            maintenance.drop(store, artifact)
        with pytest.raises(StoreBusy):
            maintenance.drop(store, "sites/resid_post.1")  # what it reads
        with pytest.raises(StoreBusy):
            maintenance.collect_garbage(store)
        assert hashes(store) == before
        assert goes_on(line)

    reader = StoreReader(store)
    assert list(reader.done(artifact)) == list(range(reader.layout.n_shards))
    found = maintenance.verify(store)
    assert (found.faults, found.orphans) == ([], [])
    assert maintenance.drop(store, artifact) == artifact


@pytest.mark.slow
def test_a_pass_is_dropped_at_once_when_the_run_that_began_it_was_killed(store: Path) -> None:
    kind, (_, artifact), before = "encode", RUNS["encode"], truth(store)
    with begun(kind, store) as (process, _):
        process.kill()
        process.join()
        assert maintenance.drop(store, artifact) == artifact

    assert [name for name in truth(store) if name not in before and not name.endswith("zarr.json")] == []
    found = maintenance.verify(store)
    assert (found.faults, found.orphans) == ([], [])
    with pytest.raises(UnknownName):
        maintenance.drop(store, artifact)


@pytest.mark.slow
def test_another_process_makes_the_pass_that_one_has_begun_and_both_call_it_complete(store: Path) -> None:
    with begun("encode", store) as (_, line):
        assert RUNS["encode"][0](store, tiny_world()).complete
        made = truth(store)
        assert goes_on(line)

    assert truth(store) == made
    assert maintenance.verify(store).ok


# Patience


class Clock:
    """Time that passes only while somebody sleeps; something happens when it is `seconds`."""

    def __init__(self, seconds: float, happens: Callable[[], None]) -> None:
        self.now, self.seconds, self.happens, self.started = 0.0, seconds, happens, False

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        before, self.now = self.now, self.now + 100 * seconds
        if before < self.seconds <= self.now:
            self.happens()


def test_a_finished_run_waits_for_the_lock_as_long_as_one_that_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process appends for most of an hour, which is how long it may."""
    store = Path(shutil.copytree(of_sites(), tmp_path / "copy.act"))
    appending = ExitStack()
    clock = Clock(3500.0, appending.close)

    def report(_doing: str, done: float, total: float | None, unit: str) -> None:
        if unit == "shards" and done == total and not clock.started:
            clock.started = True
            appending.enter_context(exclusive(store))
            monkeypatch.setattr("actstore.store.claims.time", clock)

    outcome = RUNS["encode"][0](store, tiny_world(), report=report)

    assert outcome.complete and clock.now >= clock.seconds
