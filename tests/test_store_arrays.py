"""Arrays, bundles and CSR: what goes in comes out, bit for bit, for zarr and anndata as they are."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_support import same_bits

from actstore.blocks import FiringsSpec, MatrixSpec, RowFirings
from actstore.errors import CorruptStore
from actstore.store import decode_bundle, encode_bundle
from actstore.store.arrays import array_metadata, encode_shard, group_metadata, lengthened, shard_file
from actstore.store.csr import decode_firings, encode_firings, index_dtype

PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES: dict[str, Any] = {"float32": np.uint32, "bfloat16": np.uint16, "int32": np.uint32}


def any_bits(dtype: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[Any]:
    """Return values of random bit patterns: NaNs with payloads, infinities, subnormals, both zeros."""
    unsigned = DTYPES[dtype]
    bits = np.random.default_rng(seed).integers(0, np.iinfo(unsigned).max, shape, dtype=unsigned, endpoint=True)
    return bits.view(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def write_array(root: Path, spec: MatrixSpec, shards: list[npt.NDArray[Any]], shard_rows: int) -> None:
    root.mkdir(parents=True)
    (root / "zarr.json").write_bytes(array_metadata(spec, len(shards) * shard_rows, shard_rows))
    for number, values in enumerate(shards):
        encoded = encode_shard(spec, values, shard_rows)
        (root / shard_file(number)).write_bytes(encoded if isinstance(encoded, bytes) else encoded.file)


def matrix(dtype: str, n_columns: int, **more: Any) -> MatrixSpec:
    return MatrixSpec("sites/x", n_columns, dtype, "width", **more)


@PROPERTY
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    shard_rows=st.integers(1, 70),
    n_columns=st.integers(1, 9),
    n_shards=st.integers(1, 3),
    per_column=st.booleans(),
    compressed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_matrix_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    shard_rows: int,
    n_columns: int,
    n_shards: int,
    per_column: bool,
    compressed: bool,
    seed: int,
) -> None:
    root = tmp_path_factory.mktemp("array") / "a"
    spec = matrix(dtype, n_columns, per_column_chunks=per_column, compressed=compressed)
    shards = [any_bits(dtype, (shard_rows, n_columns), seed + number) for number in range(n_shards)]

    write_array(root, spec, shards, shard_rows)

    assert same_bits(np.asarray(zarr.open_array(root, mode="r")[...]), np.concatenate(shards))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_shard_lacks_is_filler(tmp_path: Path, dtype: str) -> None:
    values = np.ones((5, 3), dtype=any_bits(dtype, (1,), 0).dtype)

    write_array(tmp_path / "a", matrix(dtype, 3), [values], 8)

    tail = np.asarray(zarr.open_array(tmp_path / "a", mode="r")[5:]).astype(np.float64)
    assert (tail == -1).all() if dtype == "int32" else np.isnan(tail).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_values_make_the_same_bytes(dtype: str) -> None:
    values, spec = any_bits(dtype, (64, 7), 3), matrix(dtype, 7)

    assert encode_shard(spec, values, 64) == encode_shard(spec, values.copy(), 64)
    assert array_metadata(spec, 128, 64) == array_metadata(spec, 128, 64)


def test_growing_an_array_changes_its_length_alone(tmp_path: Path) -> None:
    spec = matrix("float32", 2)

    assert lengthened(array_metadata(spec, 64, 64), 192) == array_metadata(spec, 192, 64)


def test_axes_and_columns_have_names_for_xarray(tmp_path: Path) -> None:
    write_array(tmp_path / "a", matrix("float32", 2, columns=("left", "right")), [np.zeros((4, 2))], 4)

    array = zarr.open_array(tmp_path / "a", mode="r")
    assert getattr(array.metadata, "dimension_names", None) == ("row", "width")
    assert array.attrs["columns"] == ["left", "right"]


def test_plain_zarr_in_a_fresh_process_opens_bfloat16(tmp_path: Path) -> None:
    values = any_bits("bfloat16", (16, 4), 5)
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays/zarr.json").write_bytes(group_metadata())
    write_array(tmp_path / "arrays/x", matrix("bfloat16", 4), [values], 16)
    program = (
        "import sys, zarr; a = zarr.open_group(sys.argv[1], mode='r')['x'][...]; "
        "assert 'torch' not in sys.modules; print(a.dtype, a.tobytes().hex())"
    )

    answer = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "arrays")], capture_output=True, text=True, cwd=tmp_path
    )

    assert answer.stdout.split() == ["bfloat16", values.tobytes().hex()], answer.stderr


@pytest.mark.parametrize(
    ("n_features", "expected"),
    [(1, "u1"), (2**8, "u1"), (2**8 + 1, "u2"), (2**16, "u2"), (2**16 + 1, "u4"), (2**20, "u4")],
)
def test_features_take_the_smallest_type_that_holds_them(n_features: int, expected: str) -> None:
    assert index_dtype(n_features) == np.dtype(expected)


@st.composite
def firings(draw: st.DrawFn) -> tuple[int, RowFirings]:
    """A width and the firings of up to 40 rows, many of them without any."""
    n_features = draw(st.sampled_from([1, 3, 2**8, 2**8 + 1, 2**16, 2**20]))
    counts = draw(st.lists(st.integers(0, min(n_features, 6)), min_size=1, max_size=40))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = [np.sort(random.choice(n_features, size=count, replace=False)) for count in counts]
    features = np.concatenate(rows).astype(np.int64)
    activations = random.exponential(size=len(features)).astype(np.float32) + np.float32(1e-30)
    return n_features, RowFirings(np.cumsum([0, *counts]), features, activations)


@PROPERTY
@given(firings())
def test_firings_come_back_bit_for_bit(made: tuple[int, RowFirings]) -> None:
    n_features, given_firings = made
    spec = FiringsSpec("s", n_features)

    data = encode_firings(spec, given_firings)
    found = decode_firings(data, "0.zip")

    assert data == encode_firings(spec, given_firings)
    assert same_bits(found.indptr, given_firings.indptr)
    assert same_bits(found.features, given_firings.features.astype(index_dtype(n_features)))
    assert same_bits(found.activations, given_firings.activations)


@pytest.mark.parametrize("n_features", [2**8, 2**16, 2**20])
def test_anndata_opens_and_slices_a_shard_as_it_is(tmp_path: Path, n_features: int) -> None:
    random = np.random.default_rng(8)
    dense = np.zeros((50, n_features), dtype=np.float32)
    dense[random.integers(0, 50, 300), random.integers(0, n_features, 300)] = random.exponential(size=300)
    rows, features = np.nonzero(dense)
    indptr = np.searchsorted(rows, np.arange(51)).astype(np.int64)
    path = tmp_path / "3.zip"
    path.write_bytes(encode_firings(FiringsSpec("s", n_features), RowFirings(indptr, features, dense[rows, features])))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what anndata says to its own developers
        import anndata.io

        opened = anndata.io.sparse_dataset(zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r"))
        part = opened[7:23]

    assert opened.shape == dense.shape
    assert np.array_equal(part.toarray(), dense[7:23])


def test_a_bundle_keeps_arrays_attributes_and_names_of_axes() -> None:
    arrays = {
        "weight": (any_bits("bfloat16", (33, 5), 1), ("token", "width")),
        "empty": (np.zeros((0, 4), dtype=np.int64), ("nothing", "column")),
        "text": (np.frombuffer("né\0".encode(), dtype=np.uint8), ("byte",)),
    }

    data = encode_bundle(arrays, {"softcap": 30.0, "piece": "x"}, chunk_bytes=64)
    found, attributes = decode_bundle(data, "kit")

    assert data == encode_bundle(dict(reversed(arrays.items())), {"piece": "x", "softcap": 30.0}, chunk_bytes=64)
    assert attributes == {"softcap": 30.0, "piece": "x"}
    assert all(same_bits(found[name], values) for name, (values, _) in arrays.items())


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-30], lambda data: b"", lambda data: data[200:]], ids=["cut", "empty", "headless"]
)
def test_a_bundle_that_is_not_whole_is_refused(damage: Any) -> None:
    data = encode_bundle({"values": (np.arange(100), ("x",))}, {})

    with pytest.raises(CorruptStore, match=r"7\.zip"):
        decode_bundle(damage(data), "7.zip")


def test_a_changed_byte_of_a_bundle_never_gives_other_values() -> None:
    values = np.arange(100, dtype=np.int64)
    data = bytearray(encode_bundle({"values": (values, ("x",))}, {}))
    silent = 0
    for offset in range(0, len(data), 3):
        data[offset] ^= 0x10
        try:
            found, _ = decode_bundle(bytes(data), "7.zip")
            silent += not np.array_equal(found.get("values", values), values)
        except CorruptStore:
            pass
        data[offset] ^= 0x10
    assert silent == 0
