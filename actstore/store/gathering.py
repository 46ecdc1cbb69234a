"""Rows of arrays in any order: each chunk is decoded once, and those used last are kept decoded.

The kept chunks of an array lie in one block of memory, so that rows whose chunks are there are taken in one step, as
fast as from a memory-mapped file. What it costs to know where they lie grows with the chunks that are kept, not with
those that the array has: a store may have millions of them, of each of many arrays.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ChunkCache", "Read"]

CACHE_BYTES = 256 << 20
RUN_BYTES = 32 << 20  # neighbouring chunks are read together, up to so many bytes
NOWHERE = -1
PAGE_BITS = 8
PAGE = 1 << PAGE_BITS  # chunks

Array = npt.NDArray[Any]
Numbers = npt.NDArray[np.int64]
Read = Callable[[slice], Array]
"""Returns rows [start, stop) of an array; they are whole chunks."""


class ChunkCache:
    """Decoded chunks of any arrays by name, up to about a number of bytes together; any thread may ask."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit = limit_bytes
        self._held: OrderedDict[str, _HeldChunks] = OrderedDict()
        self._lock = threading.Lock()

    def gather(self, name: str, like: Any, rows: Numbers, read: Read) -> Array:
        """Return these rows, in the order asked for: (row, …) in the array's dtype.

        `like` is the array: its shape, dtype and chunks count; `read` is how its rows are read. `rows` must exist.
        """
        with self._lock:
            if name not in self._held:
                self._held[name] = _HeldChunks(like, self._limit)
            held = self._held[name]
            self._held.move_to_end(name)
        found = held.take(rows, read)
        with self._lock:
            while self.n_bytes > self._limit and len(self._held) > 1:
                self._held.popitem(last=False)
        return found

    @property
    def n_bytes(self) -> int:
        """Bytes of all chunks that are held."""
        return sum(one.n_bytes for one in self._held.values())


class _HeldChunks:
    """Chunks of one array: as many as the limit allows, one at least; those used longest ago give way."""

    def __init__(self, like: Any, limit_bytes: int) -> None:
        self._lock = threading.Lock()
        self._length: int = like.chunks[0]
        self._n_rows: int = like.shape[0]
        row_bytes: int = int(np.prod(like.shape[1:], dtype=np.int64)) * like.dtype.itemsize
        self._chunk_bytes: int = max(1, int(self._length * row_bytes))
        n_chunks = -(-self._n_rows // self._length)
        n_places = max(1, min(n_chunks, limit_bytes // self._chunk_bytes))
        # Memory that is never written is never taken from the system.
        self._values = np.empty((n_places * self._length, *like.shape[1:]), dtype=like.dtype)
        self._places = _Places(n_chunks)
        self._n_held = 0
        # The chunk in each place, plus 1, so that 0 says that there is none.
        self._chunk_plus_1 = np.zeros(n_places, dtype=np.int64)
        self._used = np.zeros(n_places, dtype=np.int64)
        self._clock = 0

    @property
    def n_bytes(self) -> int:
        return self._n_held * self._chunk_bytes

    def take(self, rows: Numbers, read: Read) -> Array:
        with self._lock:
            chunks = rows // self._length
            places = self._places.of(chunks)
            if (places != NOWHERE).all():
                return self._taken(rows, chunks, places)
            ordered = np.sort(chunks)  # `np.unique` would import masked arrays, for 10 ms
            distinct = ordered[np.diff(ordered, prepend=-1) > 0]
            if len(distinct) <= len(self._used):
                self._fetch(distinct, read)
                return self._taken(rows, chunks, self._places.of(chunks))
            return self._take_in_parts(rows, chunks, distinct, read)

    def _taken(self, rows: Numbers, chunks: Numbers, places: Numbers) -> Array:
        """Return rows whose chunks are all held, in these places."""
        self._clock += 1
        self._used[places] = self._clock
        taken: Array = np.take(self._values, rows + (places - chunks) * self._length, axis=0)
        return taken

    def _take_in_parts(self, rows: Numbers, chunks: Numbers, distinct: Numbers, read: Read) -> Array:
        """Return rows of more chunks than can be held at once."""
        out = np.empty((len(rows), *self._values.shape[1:]), dtype=self._values.dtype)
        for first in range(0, len(distinct), len(self._used)):
            part = distinct[first : first + len(self._used)]
            here = np.flatnonzero((chunks >= part[0]) & (chunks <= part[-1]))
            self._fetch(part, read)
            out[here] = self._taken(rows[here], chunks[here], self._places.of(chunks[here]))
        return out

    def _fetch(self, wanted: Numbers, read: Read) -> None:
        """Read those of some chunks that are not held, where others were that are not wanted."""
        held = self._places.of(wanted)
        self._clock += 1
        self._used[held[held != NOWHERE]] = self._clock
        missing = wanted[held == NOWHERE]
        places = iter(np.argsort(self._used, kind="stable")[: len(missing)].tolist())
        for first, last in _runs(missing.tolist(), max(1, RUN_BYTES // self._chunk_bytes)):
            values = read(slice(first * self._length, min((last + 1) * self._length, self._n_rows)))
            for chunk in range(first, last + 1):
                start = (chunk - first) * self._length
                self._put(chunk, next(places), values[start : start + self._length])

    def _put(self, chunk: int, place: int, values: Array) -> None:
        if before := int(self._chunk_plus_1[place]):
            self._places.remove(before - 1)
        else:
            self._n_held += 1
        self._values[place * self._length : place * self._length + len(values)] = values
        self._places.put(chunk, place)
        self._chunk_plus_1[place], self._used[place] = chunk + 1, self._clock


class _Places:
    """The place of every chunk: a table in pages, of which there are only those with a chunk that has a place."""

    def __init__(self, n_chunks: int) -> None:
        self._start_of = np.zeros(n_chunks // PAGE + 1, dtype=np.int64)  # of a page in the table; 0: nothing is on it
        self._table = np.full(PAGE, NOWHERE, dtype=np.int64)
        self._n_on = [0]  # chunks on each page of the table
        self._free: list[int] = []

    def of(self, chunks: Numbers) -> Numbers:
        """Return the place of each chunk, NOWHERE where it has none."""
        return self._table.take(self._start_of.take(chunks >> PAGE_BITS) + (chunks & PAGE - 1))

    def put(self, chunk: int, place: int) -> None:
        """Give a chunk that has none a place."""
        start = int(self._start_of[chunk // PAGE]) or self._add_page(chunk)
        self._table[start + chunk % PAGE] = place
        self._n_on[start // PAGE] += 1

    def remove(self, chunk: int) -> None:
        """Take a chunk's place from it."""
        start = int(self._start_of[chunk // PAGE])
        self._table[start + chunk % PAGE] = NOWHERE
        self._n_on[start // PAGE] -= 1
        if not self._n_on[start // PAGE]:
            self._start_of[chunk // PAGE] = 0
            self._free.append(start)

    def _add_page(self, chunk: int) -> int:
        if not self._free:
            n_pages = len(self._n_on)
            self._table = np.concatenate([self._table, np.full_like(self._table, NOWHERE)])  # twice as long
            self._n_on += [0] * n_pages
            self._free = [page * PAGE for page in range(2 * n_pages - 1, n_pages - 1, -1)]
        start = self._free.pop()
        self._start_of[chunk // PAGE] = start
        return start


def _runs(chunks: list[int], longest: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last of every run of neighbours among increasing numbers, none longer than `longest`."""
    first = last = NOWHERE
    for chunk in chunks:
        if first != NOWHERE and (chunk != last + 1 or chunk - first >= longest):
            yield first, last
            first = chunk
        first = chunk if first == NOWHERE else first
        last = chunk
    if first != NOWHERE:
        yield first, last
