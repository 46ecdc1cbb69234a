"""int8 with scales: every value within half a step of what it was, whatever its neighbours are."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.quantised import GROUP, dequantise, n_groups, quantise

Rows = npt.NDArray[np.float32]


def stored(rows: Rows, dtype: torch.dtype = torch.float32) -> tuple[npt.NDArray[np.int8], Rows]:
    values, scales = quantise(torch.from_numpy(rows).to(dtype))
    return values.numpy(), scales.numpy()


def read(rows: Rows) -> Rows:
    return dequantise(*stored(rows))


def one_by_one(values: npt.NDArray[np.int8], scales: Rows) -> Rows:
    """Multiply as someone who has nothing but the two arrays would."""
    out = np.empty(values.shape, np.float32)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            out[row, column] = np.float32(values[row, column]) * scales[row, column // GROUP]
    return out


def random_rows(n_rows: int, width: int, seed: int = 0, spread: float = 0.0) -> Rows:
    """Return normal values; with `spread`, channels whose sizes differ by powers of ten."""
    random = np.random.default_rng(seed)
    sizes = 10 ** random.normal(scale=spread, size=width)
    return (random.normal(size=(n_rows, width)) * sizes).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    n_rows=st.integers(1, 5),
    width=st.integers(1, 70),
    spread=st.floats(0, 3),
    size=st.integers(-20, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_value_is_within_half_a_step_of_its_group(
    n_rows: int, width: int, spread: float, size: int, seed: int
) -> None:
    rows = random_rows(n_rows, width, seed, spread) * np.float32(10.0**size)

    values, scales = stored(rows)
    found = dequantise(values, scales)

    np.testing.assert_array_equal(found, one_by_one(values, scales))
    for row in range(n_rows):
        for group in range(n_groups(width)):
            here = slice(group * GROUP, (group + 1) * GROUP)
            largest, scale = np.abs(rows[row, here]).max(), float(scales[row, group])
            assert np.abs(found[row, here].astype(np.float64) - rows[row, here]).max() <= scale / 2 * (1 + 1e-6)
            assert float(largest) / 127 * (1 - 1e-6) <= scale <= 1.25 * float(largest) / 127 * (1 + 1e-6)


def test_a_scale_has_two_bits_of_mantissa() -> None:
    scales = stored(random_rows(50, 64, spread=3))[1]
    mantissas = {math.frexp(float(scale))[0] for scale in scales.ravel()}
    assert mantissas <= {0.5, 0.625, 0.75, 0.875}


def test_a_massive_channel_costs_its_own_group_alone() -> None:
    rows = random_rows(400, 256)
    massive = rows.copy()
    massive[:, 100] *= 1000
    inside = np.arange(256) // GROUP == 100 // GROUP

    was, now = read(rows), read(massive)

    np.testing.assert_array_equal(now[:, ~inside], was[:, ~inside])
    np.testing.assert_allclose(now[:, 100], massive[:, 100], atol=float(np.abs(massive[:, 100]).max()) / 127)
    others = inside & (np.arange(256) != 100)
    lost = np.linalg.norm(now[:, others] - rows[:, others]) / np.linalg.norm(rows)
    assert 0.1 < lost < np.sqrt(15 / 256) * 1.3, "fifteen neighbours of 256 channels, and no more"


def test_what_is_zero_stays_zero() -> None:
    rows = random_rows(3, 40)
    rows[1] = 0
    rows[2, 16:32] = 0
    found = read(rows)
    assert (found[1] == 0).all() and (found[2, 16:32] == 0).all() and (found[0] != 0).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max], ids=str)
def test_a_group_that_int8_cannot_hold_is_not_a_number(bad: float) -> None:
    rows = random_rows(3, 40)
    rows[1, 17] = bad
    values, scales = stored(rows)
    found = dequantise(values, scales)
    is_bad = np.zeros((3, 40), bool)
    is_bad[1, 16:32] = True
    np.testing.assert_array_equal(np.isnan(found), is_bad)
    assert (values[1, 16:32] == 0).all() and np.isnan(scales[1, 1])


def test_subnormal_numbers_make_no_infinity() -> None:
    tiny = np.array([[1e-45, -1e-40, 0, 1e-38] * 8], np.float32)
    found = read(tiny)
    assert np.isfinite(found).all() and np.abs(found - tiny).max() < 1e-38


def test_bfloat16_rows_are_stored_as_the_numbers_that_they_are() -> None:
    rows = torch.from_numpy(random_rows(20, 48)).to(torch.bfloat16)
    narrow, wide = quantise(rows), quantise(rows.float())
    assert torch.equal(narrow[0], wide[0]) and torch.equal(narrow[1], wide[1])


def test_many_rows_are_as_few() -> None:
    rows = random_rows(20_000, 33, seed=5)
    whole = read(rows)
    np.testing.assert_array_equal(whole[7_990:8_010], read(rows[7_990:8_010]))
    assert read(rows[:0]).shape == (0, 33)
