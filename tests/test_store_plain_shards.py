"""Shards without compression: the bytes that zarr makes, read as zarr reads them, and no damage read as numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_support import copy_of_finished, finished, same_bits
from tiny_world import SHARD_ROWS

from actstore.blocks import MatrixSpec
from actstore.errors import CorruptStore
from actstore.sealed import read_sealed
from actstore.store import PassFile, StoreReader
from actstore.store.arrays import array_metadata, encode_shard, memory_array, shard_file
from actstore.store.plain_shards import PlainShard, is_plain, join_chunks, read_plain

PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8}
SITE = "sites/resid_post.1"


def plain(dtype: str, n_columns: int, **more: Any) -> MatrixSpec:
    return MatrixSpec("sites/x", n_columns, dtype, "width", **({"compressed": False} | more))


def any_values(dtype: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[Any]:
    """Return values of random bits, NaNs among them."""
    n_bytes = int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
    bits = np.random.default_rng(seed).integers(0, 256, n_bytes, dtype=np.uint8)
    values: npt.NDArray[Any] = bits.view(DTYPES[dtype]).reshape(shape)
    return values


def by_zarr(spec: MatrixSpec, values: npt.NDArray[Any]) -> bytes:
    """Return the shard's file as zarr's own pipeline makes it."""
    metadata = json.loads(array_metadata(spec, len(values), len(values)))
    array, files = memory_array(
        name="a",
        shape=values.shape,
        chunks=tuple(metadata["codecs"][0]["configuration"]["chunk_shape"]),
        shards=values.shape,
        dtype=values.dtype,
        fill=0,
        axes=spec.axes,
        codec=None,
    )
    array[:] = values
    data: bytes = files["a/c.0.0"].to_bytes()
    return data


def file_of(spec: MatrixSpec, values: npt.NDArray[Any]) -> bytes:
    encoded = encode_shard(spec, values, len(values))
    return bytes(encoded.file) if isinstance(encoded, PlainShard) else encoded


def written(root: Path, spec: MatrixSpec, values: npt.NDArray[Any]) -> zarr.Array[Any]:
    root.mkdir(parents=True, exist_ok=True)
    (root / "zarr.json").write_bytes(array_metadata(spec, len(values), len(values)))
    (root / shard_file(0)).write_bytes(file_of(spec, values))
    return zarr.open_array(root, mode="r")


@PROPERTY
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shard_rows=st.sampled_from([1, 7, 48, 1024, 16384]),
    n_columns=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_shard_is_what_zarr_would_have_written(dtype: str, shard_rows: int, n_columns: int, seed: int) -> None:
    values = any_values(dtype, (shard_rows, n_columns), seed)
    assert file_of(plain(dtype, n_columns), values) == by_zarr(plain(dtype, n_columns), values)


@PROPERTY
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    n_columns=st.sampled_from([1, 33, 700]),
    bounds=st.tuples(st.integers(0, 4095), st.integers(1, 4096)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_window_is_what_zarr_reads(
    tmp_path: Path, dtype: str, n_columns: int, bounds: tuple[int, int], seed: int
) -> None:
    values = any_values(dtype, (4096, n_columns), seed)
    array = written(tmp_path / "a", plain(dtype, n_columns), values)
    window = slice(bounds[0], min(4096, bounds[0] + bounds[1]))

    found = read_plain(tmp_path / "a" / shard_file(0), array, window, None)

    assert is_plain(array)
    assert same_bits(found, values[window]) and same_bits(found, np.asarray(array[window]))


def test_values_that_are_not_contiguous_are_the_same_bytes() -> None:
    values = any_values("float32", (64, 6), 1)
    spec = plain("float32", 3)
    assert file_of(spec, values[:, ::2]) == file_of(spec, values[:, ::2].copy())


@pytest.mark.parametrize(
    "more",
    [{"compressed": True}, {"per_column_chunks": True}, {"n_heads": 2}],
    ids=["compressed", "a chunk for each column", "with heads"],
)
def test_other_arrays_are_read_by_zarr_or_as_zarr_reads_them(tmp_path: Path, more: dict[str, Any]) -> None:
    spec = plain("float32", 3, **more)
    values = any_values("float32", (32, *spec.row_shape), 2)
    root = tmp_path / "a"
    root.mkdir()
    (root / "zarr.json").write_bytes(array_metadata(spec, 32, 32))
    (root / shard_file(0, len(spec.axes))).write_bytes(file_of(spec, values))

    array = zarr.open_array(root, mode="r")

    assert same_bits(np.asarray(array[...]), values)
    assert is_plain(array) == ("n_heads" in more)


def test_no_changed_byte_is_read_as_a_number(tmp_path: Path) -> None:
    values = any_values("bfloat16", (1024, 300), 3)
    array = written(tmp_path / "a", plain("bfloat16", 300), values)
    file = tmp_path / "a" / shard_file(0)
    data, digest = bytearray(file.read_bytes()), join_chunks(values, array.chunks[0]).chunks_sha256
    assert same_bits(read_plain(file, array, slice(0, 1024), digest), values)
    for place in np.random.default_rng(4).integers(0, len(data), 200):
        data[place] ^= 1 << int(place % 8)
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"checksum|ends before|not those that were written"):
            read_plain(file, array, slice(0, 1024), digest)
        data[place] ^= 1 << int(place % 8)


def test_another_shard_of_the_same_size_is_refused_though_it_is_whole(tmp_path: Path) -> None:
    spec = plain("float32", 8)
    array = written(tmp_path / "a", spec, any_values("float32", (64, 8), 5))
    other = join_chunks(any_values("float32", (64, 8), 6), array.chunks[0])
    with pytest.raises(ValueError, match="not those that were written"):
        read_plain(tmp_path / "a" / shard_file(0), array, slice(3, 5), other.chunks_sha256)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_file_that_is_cut_is_refused_by_name(tmp_path: Path, kept: float) -> None:
    store = copy_of_finished(tmp_path)
    file = store / "arrays" / SITE / shard_file(1)
    os.truncate(file, int(file.stat().st_size * kept))
    with pytest.raises(CorruptStore, match=f"{SITE}/c.1.0"):
        StoreReader(store).matrix(SITE, 1)


def test_a_changed_bit_of_a_site_is_refused_by_name(tmp_path: Path) -> None:
    store = copy_of_finished(tmp_path)
    file = store / "arrays" / SITE / shard_file(1)
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    file.write_bytes(data)
    with pytest.raises(CorruptStore, match=f"{SITE}/c.1.0.*checksum"):
        StoreReader(store).gather(SITE, np.array([SHARD_ROWS]))


def test_a_pass_that_was_begun_with_compression_goes_on_so() -> None:
    """Its arrays say how they are read: a release that would choose otherwise now must not write otherwise there."""
    older = {"path": SITE, "n_columns": 4, "dtype": "float32", "column_axis": "width", "columns": []}
    recipe = read_sealed(next(finished().glob("passes/*/pass.json")))["recipe"]
    matrices = [{**older, "per_column_chunks": False}]

    made = PassFile.from_json(
        {"recipe": recipe, "matrices": matrices, "firings": [], "kit": {}, "files": {}, "health": []}
    )

    assert made.matrices[0].compressed and made.to_json()["matrices"] == matrices
    now = PassFile(recipe, (plain("float32", 4),), ())
    assert PassFile.from_json(json.loads(json.dumps(now.to_json()))) == now
