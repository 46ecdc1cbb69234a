"""Row-keyed matrices as sharded Zarr v3 arrays: metadata, one shard's bytes, reading (docs/format.md §5).

A shard is encoded by zarr into memory and written by us: durability (fsync, digest, one rename) is ours to promise.
"""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from actstore.blocks import MatrixSpec
from actstore.sealed import canonical_json

from . import bfloat16  # registers the data type: before an array of it is made or read
from .plain_shards import PlainShard, join_chunks

__all__ = [
    "FILLER",
    "SHUFFLED",
    "array_metadata",
    "compressors",
    "dtype_of",
    "encode_shard",
    "group_metadata",
    "lengthened",
    "memory_array",
    "shard_file",
]

CHUNK_BYTES = 256 * 1024
FILLER = {"float32": math.nan, "bfloat16": math.nan, "int8": 0, "int32": -1, "int64": -1, "uint8": 0}
SHUFFLED = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")
SEPARATOR = "."  # `c.<shard>.0`: one directory per array, one file per shard


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a stored type's name."""
    return bfloat16.BFloat16().to_native_dtype() if name == bfloat16.NAME else np.dtype(name)


def compressors(codec: BloscCodec | None = SHUFFLED) -> tuple[Any, ...]:
    """Return the codecs after `bytes`: what compresses, if anything does, then a CRC-32C of every chunk."""
    return (Crc32cCodec(),) if codec is None else (codec, Crc32cCodec())


def memory_array(
    *,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None,
    dtype: np.dtype[Any],
    fill: float,
    axes: tuple[str, ...],
    attributes: dict[str, Any] | None = None,
    codec: BloscCodec | None = SHUFFLED,
) -> tuple[zarr.Array[Any], dict[str, Any]]:
    """Return a new array in memory and the files it is made of, by name: what zarr would have put on disk."""
    files: dict[str, Any] = {}
    with warnings.catch_warnings():
        # zarr 3.1 warns that bfloat16 has no registered specification; docs/format.md §5 is ours.
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        array = zarr.create_array(
            MemoryStore(files),
            name=name,
            shape=shape,
            chunks=chunks,
            shards=shards,
            dtype=bfloat16.BFloat16() if dtype.name == bfloat16.NAME else dtype,
            fill_value=fill,
            compressors=compressors(codec),
            chunk_key_encoding={"name": "default", "separator": SEPARATOR},
            dimension_names=axes,
            attributes=attributes or {},
            config={"write_empty_chunks": True},
        )
    return array, files


def _chunk_shape(spec: MatrixSpec, shard_rows: int) -> tuple[int, ...]:
    """Return the inner chunk: about CHUNK_BYTES, a power of two of rows that divides the shard."""
    row_shape = (*spec.row_shape[:-1], 1) if spec.per_column_chunks else spec.row_shape
    wanted = max(4, round(math.log2(CHUNK_BYTES / (math.prod(row_shape) * dtype_of(spec.dtype).itemsize))))
    divides = shard_rows & -shard_rows
    return (min(2**wanted, divides), *row_shape)


def _array(spec: MatrixSpec, n_rows: int, shard_rows: int) -> tuple[zarr.Array[Any], dict[str, Any]]:
    return memory_array(
        name="a",
        shape=(n_rows, *spec.row_shape),
        chunks=_chunk_shape(spec, shard_rows),
        shards=(shard_rows, *spec.row_shape),
        dtype=dtype_of(spec.dtype),
        fill=FILLER[spec.dtype],
        axes=spec.axes,
        attributes={"columns": list(spec.columns)} if spec.columns else {},
        codec=SHUFFLED if spec.compressed else None,
    )


def array_metadata(spec: MatrixSpec, n_rows: int, shard_rows: int) -> bytes:
    """Return the `zarr.json` of a matrix of `n_rows` rows, as canonical JSON."""
    _, files = _array(spec, n_rows, shard_rows)
    return canonical_json(json.loads(files["a/zarr.json"].to_bytes())) + b"\n"


def group_metadata(attributes: dict[str, Any] | None = None) -> bytes:
    """Return the `zarr.json` of a group, as canonical JSON."""
    return canonical_json({"attributes": attributes or {}, "node_type": "group", "zarr_format": 3}) + b"\n"


def lengthened(metadata: bytes, n_rows: int) -> bytes:
    """Return an array's `zarr.json` with its first axis made `n_rows` long; nothing else changes."""
    body = json.loads(metadata)
    body["shape"][0] = n_rows
    return canonical_json(body) + b"\n"


def encode_shard(spec: MatrixSpec, values: npt.NDArray[Any], shard_rows: int) -> bytes | PlainShard:
    """Return the bytes of one shard's file; rows that `values` lacks become filler."""
    whole = values.astype(dtype_of(spec.dtype), copy=False)
    if len(values) < shard_rows:
        whole = np.full((shard_rows, *spec.row_shape), FILLER[spec.dtype], dtype=dtype_of(spec.dtype))
        whole[: len(values)] = values
    if not (spec.compressed or spec.per_column_chunks):
        return join_chunks(whole, _chunk_shape(spec, shard_rows)[0])
    array, files = _array(spec, shard_rows, shard_rows)
    array[:] = whole
    data: bytes = files["a/" + shard_file(0, len(spec.axes))].to_bytes()
    return data


def shard_file(shard: int, n_axes: int = 2) -> str:
    """Return the name of a shard's file inside its array's directory."""
    return SEPARATOR.join(["c", str(shard), *["0"] * (n_axes - 1)])
