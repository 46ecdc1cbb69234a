"""Shards that are not compressed, joined and read without zarr: the same bytes, at memory's speed (docs/format.md §5).

zarr's own pipeline copies each chunk several times and takes longer than the disk. Here a chunk is copied once, and its
CRC-32C is computed while the processor still has it near. Whatever else an array is, zarr writes and reads it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.codecs.bytes import Endian
from zarr.codecs.sharding import ShardingCodecIndexLocation

from actstore.sealed import sha256_hex

__all__ = ["PlainShard", "is_plain", "join_chunks", "read_plain"]

CHECKSUM_BYTES = 4
ENTRY = (2,)  # of the index, uint64: where a chunk begins, and its bytes with the checksum
ENTRY_BYTES = 16
SHARDS_KNOWN = 4096  # whose chunks' places and checksums are kept: a few KB of each

Bytes = npt.NDArray[np.uint8]


def is_plain(array: zarr.Array[Any]) -> bool:
    """Return whether an array's chunks are whole rows as they are, with a CRC-32C, and its shards end in an index."""
    codecs: list[Any] = list(getattr(array.metadata, "codecs", ()))
    sharding = codecs[0] if len(codecs) == 1 else None
    return (
        sys.byteorder == "little"
        and array.chunks[1:] == array.shape[1:]
        and isinstance(sharding, ShardingCodec)
        and sharding.index_location is ShardingCodecIndexLocation.end
        and _are_bytes_with_checksum(sharding.codecs)
        and _are_bytes_with_checksum(sharding.index_codecs)
    )


def _are_bytes_with_checksum(codecs: tuple[Any, ...]) -> bool:
    first, *rest = codecs
    return (
        isinstance(first, BytesCodec)
        and first.endian is not Endian.big
        and [type(one) for one in rest] == [Crc32cCodec]
    )


@dataclass(frozen=True)
class PlainShard:
    """A shard's file, and the checksums of its chunks, uint8 (chunk, 4): unlike its size, they tell it from others."""

    file: memoryview
    checksums: Bytes

    @property
    def chunks_sha256(self) -> str:
        """What a receipt says of the chunks, so that a reader of some of them need not read them all."""
        return sha256_hex(self.checksums.data)


def join_chunks(values: npt.NDArray[Any], chunk_rows: int) -> PlainShard:
    """Return the file of a shard: chunk after chunk of so many rows, each with its checksum, then the index."""
    chunks = _as_bytes(values).reshape(len(values) // chunk_rows, -1)
    n_chunks, n_bytes = chunks.shape
    n_stored = n_bytes + CHECKSUM_BYTES
    file = np.empty(n_chunks * n_stored + _index_bytes(n_chunks), dtype=np.uint8)
    stored = file[: n_chunks * n_stored].reshape(n_chunks, n_stored)
    for place, chunk in zip(stored, chunks, strict=True):
        place[:n_bytes] = chunk
        place[n_bytes:] = _checksum(chunk)
    index = np.empty((n_chunks, *ENTRY), dtype=np.uint64)
    index[:, 0], index[:, 1] = np.arange(n_chunks) * n_stored, n_stored
    file[n_chunks * n_stored : -CHECKSUM_BYTES] = _as_bytes(index)
    file[-CHECKSUM_BYTES:] = _checksum(_as_bytes(index))
    return PlainShard(file.data, stored[:, n_bytes:].copy())


def read_plain(file: Path, array: zarr.Array[Any], rows: slice, chunks_sha256: str | None) -> npt.NDArray[Any]:
    """Return the rows [start, stop), counted from the shard's first, of one shard's file of a plain array.

    Raises ValueError where its chunks are not those that were written, OSError where the file cannot be read.
    """
    assert array.shards is not None
    length, n_chunks = array.chunks[0], array.shards[0] // array.chunks[0]
    first, last = rows.start // length, -(-rows.stop // length)
    values = np.empty(((last - first) * length, *array.shape[1:]), dtype=array.dtype)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        found = os.fstat(descriptor)
        begins, checksums = _proved_chunks(
            file, (found.st_ino, found.st_size, found.st_mtime_ns), n_chunks, chunks_sha256
        )
        for chunk, place in enumerate(_as_bytes(values).reshape(last - first, -1), start=first):
            _read(descriptor, int(begins[chunk]), place)
            if not np.array_equal(_checksum(place), checksums[chunk]):
                raise ValueError(f"the checksum of chunk {chunk} does not match")
    finally:
        os.close(descriptor)
    return values[rows.start - first * length : rows.stop - first * length]


@lru_cache(SHARDS_KNOWN)
def _proved_chunks(
    file: Path, _: tuple[int, ...], n_chunks: int, chunks_sha256: str | None
) -> tuple[npt.NDArray[np.uint64], Bytes]:
    """Return where every chunk begins, uint64 (chunk), and its checksum, uint8 (chunk, 4).

    They are known as long as the file is as it was. Raises ValueError where they are not what the receipt says; an
    older one says nothing.
    """
    index = np.empty((n_chunks, *ENTRY), dtype=np.uint64)
    checksum = np.empty(CHECKSUM_BYTES, dtype=np.uint8)
    checksums = np.empty((n_chunks, CHECKSUM_BYTES), dtype=np.uint8)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        end = os.fstat(descriptor).st_size
        _read(descriptor, end - _index_bytes(n_chunks), _as_bytes(index))
        _read(descriptor, end - CHECKSUM_BYTES, checksum)
        if not np.array_equal(_checksum(_as_bytes(index)), checksum):
            raise ValueError("the checksum of its index does not match")
        for (begin, n_stored), place in zip(index.tolist(), checksums, strict=True):
            _read(descriptor, begin + n_stored - CHECKSUM_BYTES, place)
    finally:
        os.close(descriptor)
    if chunks_sha256 is not None and sha256_hex(checksums.data) != chunks_sha256:
        raise ValueError("its chunks are not those that were written")
    return index[:, 0], checksums


def _read(descriptor: int, begin: int, out: Bytes) -> None:
    """Fill `out` from a place in a file; raises ValueError where the file ends before."""
    if begin < 0 or begin >= 1 << 62 or os.preadv(descriptor, [out.data], begin) != len(out):
        raise ValueError(f"it ends before {len(out)} bytes at {begin}")


def _index_bytes(n_chunks: int) -> int:
    return n_chunks * ENTRY_BYTES + CHECKSUM_BYTES


def _as_bytes(values: npt.NDArray[Any]) -> Bytes:
    """Return an array's memory as one row of bytes."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _checksum(data: Bytes) -> Bytes:
    """Return the CRC-32C as it is stored: four bytes, little-endian."""
    return np.array([google_crc32c.value(data)], dtype="<u4").view(np.uint8)
