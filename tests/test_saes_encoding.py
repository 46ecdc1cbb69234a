"""Encoding is the published equation, sparse, deterministic in its tile, and NaN stays where it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from saes_support import random_arrays

from actstore.errors import InvalidInput
from actstore.recipe import SaeIdentity
from actstore.saes import EncodedTile, SaeEncoder, SparseCoder, round_mantissa

torch.set_num_threads(1)


def make_coder(**changes: Any) -> SparseCoder:
    arrays = random_arrays() | changes
    identity = SaeIdentity(
        sae="tiny", site="resid_post.3", width=48, d_in=10, architecture="jumprelu", weights_digest="0" * 64
    )
    return SparseCoder(identity, **{name.lower(): array for name, array in arrays.items()})


CODER = make_coder()
ENCODER = SaeEncoder(CODER, "cpu")


def some_rows(n_rows: int = 64, seed: int = 5) -> torch.Tensor:
    return torch.randn(n_rows, 10, generator=torch.Generator().manual_seed(seed))


def dense(tile: EncodedTile) -> npt.NDArray[np.float32]:
    """Return the listed firings as a matrix (row, feature), checking that they are in order."""
    matrix = np.zeros((len(tile.counts), 48), np.float32)
    rows = np.repeat(np.arange(len(tile.counts)), tile.counts.numpy())
    features = tile.features.numpy()
    assert (np.diff(rows * 48 + features) > 0).all(), "firings are increasing within each row"
    matrix[rows, features] = tile.activations.numpy()
    return matrix


def reference(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The published equations, one row and one feature at a time, in float64."""
    features = np.zeros((len(rows), 48))
    for r, row in enumerate(rows.astype(np.float64)):
        for f in range(48):
            before = float(row @ CODER.w_enc[:, f].astype(np.float64) + CODER.b_enc[f])
            features[r, f] = before if before > CODER.threshold[f] else 0.0
    return features, features @ CODER.w_dec.astype(np.float64) + CODER.b_dec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_encoding_is_the_published_equation(dtype: torch.dtype) -> None:
    rows = some_rows().to(dtype)
    tile = ENCODER.encode(rows)
    features, decoded = reference(rows.float().numpy())
    assert 0 < (features > 0).mean() < 0.5, "the thresholds divide"
    np.testing.assert_allclose(dense(tile), features, rtol=1e-5, atol=1e-6)
    x = rows.double().numpy()
    expected = [(features > 0).sum(1), np.linalg.norm(x, axis=1), np.linalg.norm(x - decoded, axis=1)]
    np.testing.assert_allclose(tile.reconstruction.numpy(), np.stack(expected, 1), rtol=1e-5)
    assert (tile.features.dtype, tile.activations.dtype) == (torch.int32, torch.float32)


def test_the_threshold_itself_does_not_fire() -> None:
    w_enc, w_dec = np.zeros((10, 48), np.float32), CODER.w_dec
    b_enc = np.full(48, 1.5, np.float32)
    threshold = np.full(48, 1.5, np.float32)
    threshold[7] = np.nextafter(np.float32(1.5), np.float32(0))
    tile = SaeEncoder(make_coder(W_enc=w_enc, W_dec=w_dec, b_enc=b_enc, threshold=threshold), "cpu").encode(
        some_rows(1)
    )
    assert tile.features.tolist() == [7] and tile.activations.tolist() == [1.5]


def test_rows_that_are_not_listed_are_counted_but_do_not_fire() -> None:
    rows = some_rows()
    listed = torch.arange(64) % 3 != 0
    every, some = ENCODER.encode(rows), ENCODER.encode(rows, listed)
    assert torch.equal(some.reconstruction, every.reconstruction)
    expected = dense(every)
    expected[::3] = 0
    np.testing.assert_array_equal(dense(some), expected)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_filler_of_any_content_stays_where_it_is(poison: float) -> None:
    rows = some_rows()
    clean = ENCODER.encode(rows)
    rows[40:, 3] = poison
    found = ENCODER.encode(rows, torch.arange(64) < 40)
    np.testing.assert_array_equal(dense(found)[:40], dense(clean)[:40])
    assert torch.equal(found.reconstruction[:40], clean.reconstruction[:40])
    assert found.reconstruction[40:].isnan().all() and not found.counts[40:].any()


def test_a_broken_row_that_is_listed_shows_and_does_not_fire() -> None:
    rows = some_rows()
    rows[9, 0] = float("nan")
    found = ENCODER.encode(rows)
    assert found.counts[9] == 0 and found.reconstruction[9].isnan().all()


def test_a_row_gives_the_same_bits_in_every_tile_of_one_size() -> None:
    rows = some_rows(128)
    shuffled = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    first, second = dense(ENCODER.encode(rows)), dense(ENCODER.encode(rows[shuffled]))
    np.testing.assert_array_equal(second, first[shuffled.numpy()])


@pytest.mark.parametrize("n_rows", [0, 1])
def test_small_tiles(n_rows: int) -> None:
    tile = ENCODER.encode(some_rows(n_rows))
    assert len(tile.counts) == n_rows and tile.reconstruction.shape == (n_rows, 3)


def test_nothing_fires() -> None:
    tile = SaeEncoder(make_coder(threshold=np.full(48, 1e9, np.float32)), "cpu").encode(some_rows())
    assert not tile.counts.any() and not len(tile.features) and not tile.reconstruction[:, 0].any()


@pytest.mark.parametrize("shape", [(4, 9), (4,), (2, 4, 10)], ids=str)
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"Accepted: \(row, 10\)"):
        ENCODER.encode(torch.zeros(shape))


def test_encoding_switches_tf32_off() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    SaeEncoder(CODER, "cpu")
    assert not torch.backends.cuda.matmul.allow_tf32


POSITIVE = st_numpy.arrays(np.float32, st.integers(0, 20), elements=st.floats(0, width=32, allow_nan=False))


@given(POSITIVE, st.integers(1, 23))
def test_rounding_keeps_the_nearest_number_with_so_many_bits(values: npt.NDArray[np.float32], bits: int) -> None:
    rounded = round_mantissa(values, bits)
    assert rounded.dtype == np.float32
    assert not (rounded.view(np.uint32) & np.uint32((1 << (23 - bits)) - 1)).any(), "the other bits are zero"
    assert (np.isfinite(rounded) == np.isfinite(values)).all() and ((rounded > 0) == (values > 0)).all()
    np.testing.assert_array_equal(round_mantissa(rounded, bits), rounded)
    normal = np.isfinite(values) & (values > 1e-30) & (values < 1e38)
    assert (np.abs(rounded[normal] - values[normal]) <= values[normal] * 2.0 ** -(bits + 1)).all()


@given(st_numpy.arrays(np.float32, 20, elements=st.floats(2**-13, 65000, width=32)))
def test_ten_bits_are_what_float16_keeps(values: npt.NDArray[np.float32]) -> None:
    np.testing.assert_array_equal(round_mantissa(values, 10), values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("value", "bits", "expected"),
    [
        pytest.param(1 + 2**-11, 10, 1.0, id="tie_to_even_below"),
        pytest.param(1 + 3 * 2**-11, 10, 1 + 2**-9, id="tie_to_even_above"),
        pytest.param(float(np.finfo(np.float32).max), 10, float.fromhex("0x1.ffcp127"), id="largest_stays_finite"),
        pytest.param(2.0**-149, 10, 2.0**-136, id="smallest_stays_positive"),
        pytest.param(0.0, 10, 0.0, id="zero"),
        pytest.param(float("inf"), 10, float("inf"), id="infinity"),
        pytest.param(-(1 + 2**-11 + 2**-20), 10, -(1 + 2**-10), id="negative"),
        pytest.param(1.2345678, 23, float(np.float32(1.2345678)), id="all_bits"),
    ],
)
def test_rounding_at_the_edges(value: float, bits: int, expected: float) -> None:
    assert round_mantissa(np.array([value], np.float32), bits)[0] == expected


def test_nan_survives_rounding() -> None:
    assert np.isnan(round_mantissa(np.array([np.nan], np.float32), 3)).all()


@pytest.mark.parametrize("bits", [0, 24, -1])
def test_impossible_bits_are_refused(bits: int) -> None:
    with pytest.raises(InvalidInput, match="1 to 23"):
        round_mantissa(np.ones(1, np.float32), bits)
