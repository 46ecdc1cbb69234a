"""Arrays whose length is known only at the end: documents, sequences, text (docs/format.md §4).

Full shards are written as they fill; the last one and the metadata when the array is closed, so memory stays constant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.sealed import canonical_json

from .arrays import FILLER, memory_array

__all__ = ["GrowingArray", "GrowingSpec"]

SHARD_BYTES = 8 << 20
CHUNK_BYTES = 256 << 10


@dataclass(frozen=True)
class GrowingSpec:
    """An array of a segment: its name, type, axes and the names of its columns (none: one dimension)."""

    name: str
    dtype: str
    axes: tuple[str, ...]
    columns: tuple[str, ...] = ()

    @property
    def tail(self) -> tuple[int, ...]:
        """Shape after the first axis."""
        return (len(self.columns),) if self.columns else ()


class GrowingArray:
    """Collects values and hands every full shard's bytes to `write(file name, bytes, values)`."""

    def __init__(self, spec: GrowingSpec, write: Callable[[str, bytes, npt.NDArray[Any]], None]) -> None:
        self.spec = spec
        item_bytes = np.dtype(spec.dtype).itemsize * int(np.prod(spec.tail, dtype=np.int64))
        self._shard, self._chunk = SHARD_BYTES // item_bytes, CHUNK_BYTES // item_bytes
        self._shard -= self._shard % self._chunk
        self._write = write
        self._waiting: list[npt.NDArray[Any]] = []
        self._length = self._n_waiting = self._n_shards = 0

    def __len__(self) -> int:
        return self._length

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add values along the first axis."""
        self._waiting.append(values.astype(self.spec.dtype, copy=False).reshape(-1, *self.spec.tail))
        self._n_waiting += len(self._waiting[-1])
        self._length += len(self._waiting[-1])
        while self._n_waiting >= self._shard:
            self._flush()

    def close(self) -> bytes:
        """Write what is left and return the array's `zarr.json`."""
        if self._n_waiting:
            self._flush()
        _, files = self._array(len(self), self.spec.columns)
        return canonical_json(json.loads(files["a/zarr.json"].to_bytes())) + b"\n"

    def _flush(self) -> None:
        together = np.concatenate(self._waiting)
        values, rest = together[: self._shard], together[self._shard :]
        array, files = self._array(self._shard, ())  # a whole shard: what lies past the array's end is fill
        array[: len(values)] = values
        column = ".0" if self.spec.tail else ""
        self._write(f"c.{self._n_shards}{column}", files[f"a/c.0{column}"].to_bytes(), values)
        self._waiting, self._n_waiting = [rest], len(rest)
        self._n_shards += 1

    def _array(self, length: int, columns: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        return memory_array(
            name="a",
            shape=(length, *self.spec.tail),
            chunks=(self._chunk, *self.spec.tail),
            shards=(self._shard, *self.spec.tail),
            dtype=np.dtype(self.spec.dtype),
            fill=FILLER[self.spec.dtype],
            axes=self.spec.axes,
            attributes={"columns": list(columns)} if columns else {},
        )
