"""Reading shards of arrays that must be there: a file that is missing or cut is an error, never fill values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from actstore.blocks import scales_path
from actstore.errors import CorruptStore, explain
from actstore.quantised import dequantise
from actstore.sealed import sha256_hex

from .arrays import SEPARATOR
from .files import ARRAYS, metadata_file
from .location import Location
from .plain_shards import is_plain, read_plain

__all__ = ["Files", "damaged", "decoded", "read_file", "read_rows"]

Files = Mapping[str, Mapping[str, Any]]  # path → what a receipt or manifest says of it


def damaged(name: str, why: str) -> CorruptStore:
    """Return the error for a file that cannot be read as it was written."""
    return CorruptStore(
        explain(
            f"{name} cannot be read: {why.splitlines()[0] if why else 'no reason given'}",
            next_step="run `actstore verify`, which names everything that is damaged",
        )
    )


def read_file(location: Location, name: str, files: Files) -> bytes:
    """Return a file's bytes; raises CorruptStore where they are not those that were written."""
    try:
        data = location.read(name)
    except FileNotFoundError as error:
        raise damaged(name, "it is missing") from error
    if name not in files or sha256_hex(data) != files[name]["sha256"]:
        raise damaged(name, "it is not what was written")
    return data


def read_rows(location: Location, array: zarr.Array[Any], path: str, rows: slice, files: Files) -> npt.NDArray[Any]:
    """Return the rows [start, stop) of the array at `path` below `arrays/`, in its stored dtype.

    Every shard's file must be there with the size it was written with, and every chunk that is read has its checksum.
    Raises CorruptStore, naming the file.
    """
    if rows.stop <= rows.start:
        return np.empty((0, *array.shape[1:]), dtype=array.dtype)
    assert array.shards is not None
    length = array.shards[0]
    names = [_shard_file(array, path, shard) for shard in range(rows.start // length, -(-rows.stop // length))]
    for name in names:
        _must_be_whole(location, name, files)
    try:
        values = _read(location, array, names, rows, files)
    except (ValueError, RuntimeError, OSError) as error:
        raise damaged(" or ".join(names), str(error)) from error
    if len(values) != rows.stop - rows.start:
        raise damaged(metadata_file(path), f"the array ends at {array.shape[0]}, before {rows.stop}")
    return values


def decoded(path: str, read: Callable[[str], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return the rows that `read` finds at a path; where they are quantised, the numbers that they stand for.

    Everything that reads the rows of a site reads them through here.
    """
    values = read(path)
    return dequantise(values, read(scales_path(path))) if values.dtype == np.int8 else values


def _read(location: Location, array: zarr.Array[Any], names: list[str], rows: slice, files: Files) -> npt.NDArray[Any]:
    """Return rows of the shards that these files are; zarr reads what is compressed or far away."""
    if location.local is None or not is_plain(array):
        return np.asarray(array[rows])
    assert array.shards is not None
    length, end = array.shards[0], min(rows.stop, array.shape[0])
    parts = [
        read_plain(
            location.local / name,
            array,
            slice(max(0, rows.start - first), min(length, end - first)),
            files[name].get("chunks_sha256"),
        )
        for name, first in zip(names, range(rows.start // length * length, rows.stop, length), strict=True)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _shard_file(array: zarr.Array[Any], path: str, shard: int) -> str:
    return f"{ARRAYS}/{path}/" + SEPARATOR.join(["c", str(shard), *["0"] * (array.ndim - 1)])


def _must_be_whole(location: Location, name: str, files: Files) -> None:
    if name not in files:
        raise damaged(name, "no receipt names it")
    try:
        n_bytes = location.size(name)
    except FileNotFoundError as error:
        raise damaged(name, "it is missing") from error
    if n_bytes != files[name]["bytes"]:
        raise damaged(name, f"it has {n_bytes} bytes where {files[name]['bytes']} were written")
