"""Reading one segment's documents and sequences (docs/format.md §4)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr

from actstore.blocks import Segment

from .gathering import ChunkCache
from .kit import unpack_texts
from .location import Location
from .proved import Files, read_rows

__all__ = ["SegmentReader"]

DOCUMENTS_PER_BATCH = 4096
LONG_TEXT_BYTES = 1 << 20  # a longer text is read by itself
TEXT_BYTES = 16 << 20  # of text and metadata in a batch, unless one document is longer


@dataclass(frozen=True)
class SegmentReader:
    """What was added together: its documents, their texts, their sequences."""

    segment: Segment
    location: Location
    array: Callable[[str], zarr.Array[Any]]
    chunks: ChunkCache
    files: Files

    def sequences(self) -> npt.NDArray[np.int64]:
        """Return doc, first row and n_tokens of every sequence: int64 (seq, 3)."""
        return np.asarray(self._values("sequences", 0, self.segment.n_seqs), dtype=np.int64)

    @cached_property
    def held_sequences(self) -> npt.NDArray[np.int64]:
        """As `sequences`, read once."""
        return self.sequences()

    def documents(self) -> Iterator[pa.RecordBatch]:
        """Yield the documents, a few thousand at a time."""
        for start in range(0, self.segment.n_docs, DOCUMENTS_PER_BATCH):
            values = self._values("documents", start, min(start + DOCUMENTS_PER_BATCH, self.segment.n_docs))
            # Long documents are fewer at a time: by the multiple of TEXT_BYTES in which each begins.
            begins = (values[:, 0] + values[:, 2] - values[0, 0] - values[0, 2]) // TEXT_BYTES
            bounds = [0, *(np.flatnonzero(np.diff(begins)) + 1).tolist(), len(values)]
            for low, high in itertools.pairwise(bounds):
                yield self._batch(self.segment.first_doc + start + low, values[low:high])

    def _batch(self, first_doc: int, values: npt.NDArray[np.int64]) -> pa.RecordBatch:
        size = len(values)
        return pa.RecordBatch.from_pydict(
            {
                "doc": pa.array(np.arange(size, dtype=np.int64) + first_doc),
                "segment": pa.array(np.full(size, self.segment.segment, dtype=np.int32)),
                "text": self._texts("text", values[:, 0], values[:, 1]),
                "n_tokens": pa.array(values[:, 4]),
                "metadata": self._texts("metadata", values[:, 2], values[:, 3]),
                "parent": pa.nulls(size, pa.int64()),
                "variant": pa.nulls(size, pa.string()),
            }
        )

    def text(self, doc: int) -> str:
        """Return the text of one document, by its number in the store."""
        place = doc - self.segment.first_doc
        start, end = map(int, self._gathered("documents", np.array([place]))[0, :2])
        if end - start > LONG_TEXT_BYTES:
            return bytes(self._values("text", start, end)).decode()
        return bytes(self._gathered("text", np.arange(start, end))).decode()

    def _texts(self, name: str, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> pa.Array:
        packed = np.asarray(self._values(name, int(starts[0]), int(ends[-1])), dtype=np.uint8)
        return unpack_texts(packed, np.concatenate([starts, ends[-1:]]))

    def _gathered(self, name: str, places: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return some rows of an array, whose chunks are kept a while."""
        path = self._path(name)
        if not len(places):
            return np.empty(0, dtype=np.uint8)

        def read(rows: slice) -> npt.NDArray[Any]:
            return self._values(name, rows.start, rows.stop)

        return self.chunks.gather(path, self.array(path), places, read)

    def _path(self, name: str) -> str:
        return f"corpus/segments/{self.segment.segment}/{name}"

    def _values(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        path = self._path(name)
        return read_rows(self.location, self.array(path), path, slice(start, stop), self.files)
