"""A Zarr group in one file: an uncompressed zip with fixed dates, same bytes for same arrays (docs/format.md §6).

`zarr.open_group(zarr.storage.ZipStore("x.zip"), mode="r")` opens it; so anndata does, and all that stands on zarr.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest
from zarr.codecs import BloscCodec
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import MemoryStore, ZipStore

from actstore.errors import CorruptStore, explain
from actstore.sealed import canonical_json

from .arrays import SHUFFLED, group_metadata, memory_array, shard_file

__all__ = ["decode_bundle", "encode_bundle", "open_bundle", "open_bundle_file", "write_large_bundle"]

CHUNK_BYTES = 256 * 1024
SPARE_BYTES, GROWTH = 64 << 20, 1000  # what a damaged or foreign bundle may decode to at most
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip: times are outside identity


def encode_bundle(
    arrays: Mapping[str, tuple[npt.NDArray[Any], tuple[str, ...]]],
    attributes: Mapping[str, Any],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    codecs: Mapping[str, BloscCodec] | None = None,
) -> bytes:
    """Return the file of a group with these arrays; each comes with the names of its axes.

    `codecs` compress the arrays that they name; the others are compressed as matrices are.
    """
    entries = {"zarr.json": group_metadata(dict(attributes))}
    for name, (values, axes) in arrays.items():
        entries |= _array_entries(name, values, axes, chunk_bytes, (codecs or {}).get(name, SHUFFLED))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(entries):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), entries[name])
    return buffer.getvalue()


def _array_entries(
    name: str, values: npt.NDArray[Any], axes: tuple[str, ...], chunk_bytes: int, codec: BloscCodec
) -> dict[str, bytes]:
    row_bytes = max(1, values[:1].nbytes)
    chunk = max(1, min(max(1, len(values)), chunk_bytes // row_bytes))
    n_chunks = max(1, -(-len(values) // chunk))
    tail = values.shape[1:]
    array, files = memory_array(
        name=name,
        shape=values.shape,
        chunks=(chunk, *tail),
        shards=(chunk * n_chunks, *tail),
        dtype=values.dtype,
        fill=0,
        axes=axes,
        codec=codec,
    )
    if values.size:
        array[:] = values
    entries = {key: buffer.to_bytes() for key, buffer in files.items() if key.startswith(f"{name}/")}
    entries[f"{name}/zarr.json"] = canonical_json(json.loads(entries[f"{name}/zarr.json"])) + b"\n"
    return entries


def write_large_bundle(
    file: IO[bytes],
    arrays: Mapping[str, tuple[npt.NDArray[Any], tuple[str, ...]]],
    attributes: Mapping[str, Any],
    chunk_bytes: int,
) -> None:
    """Write a group of arrays that are too large to be copied, uncompressed, a chunk of rows at a time.

    Every chunk is an entry of its own: a reader of a zip cannot begin in the middle of one.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, (values, axes) in sorted(arrays.items()):
            for entry, data in _chunk_entries(name, values, axes, chunk_bytes):
                archive.writestr(zipfile.ZipInfo(entry, EPOCH), data)
        archive.writestr(zipfile.ZipInfo("zarr.json", EPOCH), group_metadata(dict(attributes)))


def _chunk_entries(
    name: str, values: npt.NDArray[Any], axes: tuple[str, ...], chunk_bytes: int
) -> Iterator[tuple[str, bytes]]:
    """Yield the entries of an array, sorted by name; one chunk is in memory at a time."""
    tail = values.shape[1:]
    chunk = max(1, min(len(values), chunk_bytes // max(1, values[:1].nbytes)))
    array, files = memory_array(
        name=name,
        shape=values.shape,
        chunks=(chunk, *tail),
        shards=None,
        dtype=values.dtype,
        fill=0,
        axes=axes,
        codec=None,
    )
    metadata = canonical_json(json.loads(files[f"{name}/zarr.json"].to_bytes())) + b"\n"
    firsts = range(0, len(values) if values.size else 0, chunk)
    entries = {f"{name}/{shard_file(number, values.ndim)}": first for number, first in enumerate(firsts)}
    for entry, first in sorted(entries.items()):
        array[first : first + chunk] = values[first : first + chunk]
        yield entry, files.pop(entry).to_bytes()
    yield f"{name}/zarr.json", metadata


def open_bundle(data: bytes, name: str) -> zarr.Group:
    """Return the group in a bundle's bytes; `name` is how a message calls the file.

    Raises CorruptStore where the bytes are not a bundle.
    """
    prototype = default_buffer_prototype()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _refuse_packed(archive, len(data))
            entries = {entry: prototype.buffer.from_bytes(archive.read(entry)) for entry in archive.namelist()}
        return zarr.open_group(MemoryStore(entries, read_only=True), mode="r")
    except (zipfile.BadZipFile, KeyError, ValueError, FileNotFoundError, EOFError, NotImplementedError) as error:
        raise CorruptStore(
            explain(f"{name} cannot be read ({error})", next_step="run `actstore verify` on the store")
        ) from error


def _refuse_packed(archive: zipfile.ZipFile, n_bytes: int) -> None:
    """Raise ValueError for entries that would unpack to more than the file: a bundle stores them as they are."""
    entries = archive.infolist()
    if (
        any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        or sum(e.file_size for e in entries) > n_bytes
    ):
        raise ValueError("its entries are packed")


def open_bundle_file(path: Path) -> zarr.Group:
    """Return the group in a local bundle, read chunk by chunk from the disk.

    Raises CorruptStore where the file is not a bundle; so do its arrays where a chunk is not what was written.
    """
    try:
        return zarr.open_group(_BundleFile(path, mode="r", read_only=True), mode="r")
    except (zipfile.BadZipFile, KeyError, ValueError, FileNotFoundError) as error:
        raise CorruptStore(
            explain(f"{path} cannot be read ({error})", next_step="run `actstore verify` on the store")
        ) from error


class _BundleFile(ZipStore):
    """A bundle on the disk, whose entries zip's own checksums prove as they are read."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        try:
            return await super().get(key, prototype or default_buffer_prototype(), byte_range)
        except (zipfile.BadZipFile, EOFError) as error:
            raise CorruptStore(
                explain(f"{self.path} is damaged ({error})", next_step="run `actstore verify` on the store")
            ) from error


def decode_bundle(data: bytes, name: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return every array of a bundle by name, and the group's attributes.

    Raises CorruptStore where a chunk's checksum does not match.
    """
    group = open_bundle(data, name)
    try:
        held = dict(group.arrays())
        if sum(array.nbytes for array in held.values()) > SPARE_BYTES + GROWTH * len(data):
            raise ValueError("its arrays claim more than such a file can hold")
        arrays = {key: np.asarray(array[...]) for key, array in held.items()}
    except (ValueError, RuntimeError) as error:
        raise CorruptStore(
            explain(f"{name} is damaged ({error})", next_step="run `actstore verify` on the store")
        ) from error
    return arrays, dict(group.attrs)
