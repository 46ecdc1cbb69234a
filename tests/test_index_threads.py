"""Parts of several SAEs are made at once: what they say stays the same, and whatever ends one ends all."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from index_support import HALF, WIDE, FakeSource, content

from actstore.blocks import RowFirings
from actstore.errors import CorruptStore
from actstore.index import build_index

ONE_THREAD = 1 << 29  # bytes: less than what two would be given
N_SHARDS = 24
SECONDS = 30.0  # until what never comes is given up


class Watched(FakeSource):
    """A source that calls `meets` before it gives the firings of a shard, and counts what was asked for."""

    def __init__(self, n_shards: int = N_SHARDS) -> None:
        super().__init__([n_shards])
        self.meets: Callable[[str, int], None] = lambda _sae, _shard: None
        self.asked: list[tuple[str, int]] = []
        self.extract(*range(n_shards))

    def firings(self, sae: str, shard: int) -> RowFirings:
        self.asked.append((sae, shard))
        self.meets(sae, shard)
        return super().firings(sae, shard)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr("actstore.index.build.os.cpu_count", lambda: 2)
    return Watched()


def test_two_saes_are_indexed_at_once_and_say_what_one_thread_says(source: Watched, tmp_path: Path) -> None:
    calm = copy.deepcopy(source)
    both = threading.Barrier(2)

    def meets(sae: str, shard: int) -> None:
        if shard == 0:
            both.wait(SECONDS)  # for the other SAE

    source.meets = meets
    build_index(source, tmp_path / "at once")
    build_index(calm, tmp_path / "one", memory_bytes=ONE_THREAD)
    assert content(tmp_path / "at once") == content(tmp_path / "one")


def test_without_memory_for_two_there_is_one_thread(source: Watched, tmp_path: Path) -> None:
    build_index(source, tmp_path, memory_bytes=ONE_THREAD)
    order = [sae for sae, _ in source.asked]
    assert order == [HALF] * N_SHARDS + [WIDE] * N_SHARDS


def test_an_error_of_one_ends_the_other_and_leaves_nothing(source: Watched, tmp_path: Path) -> None:
    begun, failed = threading.Event(), threading.Event()

    def meets(sae: str, shard: int) -> None:
        if sae == WIDE:
            begun.set()
            assert failed.wait(SECONDS)
        elif shard == 2:
            assert begun.wait(SECONDS)
            threading.Timer(0.2, failed.set).start()  # when the error has been seen
            raise CorruptStore("the third shard is damaged")

    source.meets = meets
    with pytest.raises(CorruptStore, match="third shard"):
        build_index(source, tmp_path)
    assert len([sae for sae, _ in source.asked if sae == WIDE]) < N_SHARDS / 2
    assert not list(tmp_path.iterdir())


def test_an_interrupt_ends_all_threads_and_leaves_nothing(source: Watched, tmp_path: Path) -> None:
    interrupted = threading.Event()

    def meets(sae: str, shard: int) -> None:
        if sae == WIDE and shard == 0:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(1.0, interrupted.set).start()
        assert interrupted.wait(SECONDS)

    source.meets = meets
    with pytest.raises(KeyboardInterrupt):
        build_index(source, tmp_path)
    assert len(source.asked) < N_SHARDS
    assert not list(tmp_path.iterdir())
