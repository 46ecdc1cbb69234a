"""Rows of arrays with more chunks than are kept: the rows are right, and nothing grows with the chunks of the array."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.store.gathering import PAGE, ChunkCache

WIDTH = 3
STATM = Path("/proc/self/statm")


class Numbered:
    """An array whose rows say their own numbers: as long as one likes, without being anywhere."""

    dtype = np.dtype(np.int64)

    def __init__(self, n_rows: int, chunk_rows: int, width: int = WIDTH) -> None:
        self.shape, self.chunks = (n_rows, width), (chunk_rows, width)
        self.chunks_read: list[int] = []

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, None] * 10 + np.arange(self.shape[1])

    def read(self, span: slice) -> np.ndarray:
        self.chunks_read += range(span.start // self.chunks[0], -(-span.stop // self.chunks[0]))
        return self.rows(np.arange(span.start, span.stop))


@settings(deadline=None, max_examples=120)
@given(
    n_chunks=st.integers(1, 6 * PAGE),
    chunk_rows=st.integers(1, 3),
    n_kept=st.integers(1, 40),
    wanted=st.lists(st.lists(st.integers(0, 1 << 40), max_size=60), min_size=1, max_size=12),
)
def test_rows_of_chunks_that_come_and_go(n_chunks: int, chunk_rows: int, n_kept: int, wanted: list[list[int]]) -> None:
    array = Numbered(n_chunks * chunk_rows, chunk_rows)
    chunk_bytes = chunk_rows * WIDTH * array.dtype.itemsize
    cache = ChunkCache(n_kept * chunk_bytes)
    for numbers in wanted:
        rows = np.array(numbers, dtype=np.int64) % array.shape[0]
        array.chunks_read.clear()
        np.testing.assert_array_equal(cache.gather("a", array, rows, array.read), array.rows(rows))
        assert len(set(array.chunks_read)) == len(array.chunks_read) and set(array.chunks_read) <= set(
            (rows // chunk_rows).tolist()
        )
        assert cache.n_bytes <= n_kept * chunk_bytes and cache.n_bytes % chunk_bytes == 0
        if len(np.unique(rows // chunk_rows)) <= n_kept:
            array.chunks_read.clear()
            cache.gather("a", array, rows[::-1], array.read)
            assert array.chunks_read == [], "what was used last is kept"


def test_chunks_used_longest_ago_give_way() -> None:
    array = Numbered(100 * PAGE, 1)
    cache = ChunkCache(3 * WIDTH * 8)
    places = np.array([0, PAGE, 50 * PAGE, 99 * PAGE])
    for asked, missing in ((0, 1), (1, 1), (2, 1), (0, 0), (3, 1), (0, 0), (2, 0), (1, 1), (3, 1)):
        array.chunks_read.clear()
        cache.gather("a", array, places[[asked]], array.read)
        assert len(array.chunks_read) == missing, asked
    assert cache.n_bytes == 3 * WIDTH * 8


@pytest.mark.skipif(not STATM.exists(), reason="the system does not say what a process takes")
def test_memory_does_not_grow_with_the_chunks_that_an_array_has() -> None:
    arrays = {f"site {number}": Numbered(2_560_000 * 64, 64, 8) for number in range(26)}
    cache = ChunkCache()
    before = _resident_bytes()
    for name, array in arrays.items():
        rows = np.linspace(0, array.shape[0] - 1, 30).astype(np.int64)
        np.testing.assert_array_equal(cache.gather(name, array, rows, array.read), array.rows(rows))
    table_of_all = 2_560_000 * 8  # of one array
    assert _resident_bytes() - before < cache.n_bytes + 5 * table_of_all


def _resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_as_many_chunks_as_there_are_may_be_kept() -> None:
    array: Any = Numbered(5 * PAGE + 1, 1)
    cache = ChunkCache()
    for rows in np.array_split(np.random.default_rng(0).permutation(array.shape[0]), 40):
        np.testing.assert_array_equal(cache.gather("a", array, rows, array.read), array.rows(rows))
    array.chunks_read.clear()
    cache.gather("a", array, np.arange(array.shape[0]), array.read)
    assert array.chunks_read == [] and cache.n_bytes == array.shape[0] * WIDTH * 8
