"""The screen fires what exact arithmetic says, also where float32 cannot tell; and lists need no waiting."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from actstore.errors import InvalidInput
from actstore.extraction.tiles import encoded_tiles
from actstore.recipe import SaeIdentity
from actstore.saes import EncodedTile, Encoder, NeuronEncoder, SaeEncoder, ScreenEncoder, SparseCoder
from actstore.saes.screen import split

torch.set_num_threads(1)

D_IN, D_SAE, N_ROWS = 96, 256, 64
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.bfloat16, torch.float32]
Pairs = npt.NDArray[np.bool_]
Exact = npt.NDArray[np.float64]


def some_rows(dtype: torch.dtype, seed: int = 0, massive: float = 1.0) -> torch.Tensor:
    """Return rows, one of whose dimensions is larger than the others, as in real residual streams."""
    rows = torch.randn(N_ROWS, D_IN, generator=torch.Generator().manual_seed(seed))
    rows[:, 7] *= massive
    return rows.to(dtype)


def make_coder(
    threshold: npt.NDArray[np.float32] | None = None, seed: int = 1, bias: float = 1.0, **changes: Any
) -> SparseCoder:
    random = np.random.default_rng(seed)
    arrays = {
        "w_enc": random.normal(size=(D_IN, D_SAE)),
        "w_dec": random.normal(size=(D_SAE, D_IN)) / D_IN**0.5,
        "b_enc": bias * random.normal(size=D_SAE),
        "b_dec": random.normal(size=D_IN) / 4,
        "threshold": random.uniform(5.0, 20.0, size=D_SAE) if threshold is None else threshold,
    }
    identity = SaeIdentity(
        sae="tiny", site="resid_post.3", width=D_SAE, d_in=D_IN, architecture="jumprelu", weights_digest="0" * 64
    )
    return SparseCoder(identity, **{name: array.astype(np.float32) for name, array in arrays.items()}, **changes)


def exact_before(coder: SparseCoder, rows: torch.Tensor) -> Exact:
    """What is compared with the threshold, in float64: (row, feature)."""
    values = rows.float().numpy()
    values = values - coder.b_dec if coder.subtracts_b_dec else values
    before: Exact = values.astype(np.float64) @ coder.w_enc.astype(np.float64) + coder.b_enc
    return before


def fired(tile: EncodedTile) -> Pairs:
    """Return which features of each row are listed: bool (row, feature)."""
    found = np.zeros((len(tile.counts), D_SAE), bool)
    found[np.repeat(np.arange(len(tile.counts)), tile.counts.cpu().numpy()), tile.features.cpu().numpy()] = True
    return found


def at_its_thresholds(rows: torch.Tensor, **changes: Any) -> SparseCoder:
    """Return a coder each of whose thresholds is what one of the rows gives, rounded: float32 can only guess there."""
    before = exact_before(make_coder(**changes), rows)
    chosen = before[np.argsort(-before, axis=0)[8], np.arange(D_SAE)]
    return make_coder(np.maximum(chosen, 1e-3).astype(np.float32), **changes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("massive", [1.0, 1000.0])
@pytest.mark.parametrize("subtracts_b_dec", [False, True])
def test_what_fires_is_what_exact_arithmetic_says(
    device: str, dtype: torch.dtype, massive: float, subtracts_b_dec: bool
) -> None:
    differed = 0
    for seed in range(5):
        rows = some_rows(dtype, seed, massive)
        coder = at_its_thresholds(rows, subtracts_b_dec=subtracts_b_dec)
        exact = exact_before(coder, rows) > coder.threshold
        found = fired(ScreenEncoder(coder, device).encode(rows.to(device)))
        np.testing.assert_array_equal(found, exact)
        differed += int((fired(SaeEncoder(coder, "cpu").encode(rows)) != exact).sum())
    assert differed, "the thresholds are where float32 errs"


def test_a_bias_that_swallows_the_product_is_in_the_bound() -> None:
    rows = some_rows(torch.float32)
    coder = at_its_thresholds(rows, bias=1e6)
    exact = exact_before(coder, rows) > coder.threshold
    np.testing.assert_array_equal(fired(ScreenEncoder(coder, "cpu").encode(rows)), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_differs_only_within_its_own_rounding_error(dtype: torch.dtype) -> None:
    rows = some_rows(dtype, massive=1000.0)
    coder = at_its_thresholds(rows)
    before = exact_before(coder, rows)
    n_terms, unit = D_IN + 1, 2.0**-24
    sizes = np.abs(rows.double().numpy()) @ np.abs(coder.w_enc.astype(np.float64)) + np.abs(coder.b_enc)
    bound = n_terms * unit / (1 - n_terms * unit) * sizes  # Higham (2002), γ(n) · |x| · |w|
    screened, plain = (fired(encoder(coder, "cpu").encode(rows)) for encoder in (ScreenEncoder, SaeEncoder))
    assert (np.abs(before - coder.threshold)[screened != plain] <= bound[screened != plain]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_of_the_parts_is_below_the_bound(device: str, dtype: torch.dtype) -> None:
    rows = some_rows(dtype, massive=1000.0)
    coder = make_coder()
    encoder = ScreenEncoder(coder, device)
    parts = [rows.to(device)] if dtype == torch.bfloat16 else split(rows.to(device))
    product = encoder._product(parts).cpu().double().numpy()
    sizes = np.abs(rows.double().numpy()) @ np.abs(coder.w_enc.astype(np.float64))
    error = np.abs(product - (exact_before(coder, rows) - coder.b_enc))
    assert (error <= encoder._relative * sizes).all() and error.max() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_have_the_precision_of_float32(dtype: torch.dtype) -> None:
    rows, coder = some_rows(dtype), make_coder()
    tile = ScreenEncoder(coder, "cpu").encode(rows)
    before = exact_before(coder, rows)
    np.testing.assert_allclose(tile.activations.numpy(), before[fired(tile)], rtol=2e-6)
    assert (tile.activations.dtype, tile.features.dtype) == (torch.float32, torch.int32)


@pytest.mark.parametrize("changes", [{}, {"w_skip": np.full((D_IN, D_IN), 0.01, np.float32)}], ids=["plain", "skip"])
def test_the_reconstruction_is_that_of_float32(changes: dict[str, Any]) -> None:
    rows, coder = some_rows(torch.float32), make_coder(**changes)
    rows[3] = 0
    rows[5, 0] = torch.nan
    listed = torch.arange(N_ROWS) % 4 != 0
    screened, plain = (encoder(coder, "cpu").encode(rows, listed) for encoder in (ScreenEncoder, SaeEncoder))
    assert plain.counts[1] and not screened.counts[::4].any() and not screened.counts[5]
    np.testing.assert_allclose(screened.reconstruction.numpy(), plain.reconstruction.numpy(), rtol=1e-5)


@pytest.mark.parametrize("largest", [3.4e38, 1e30, 1e-30], ids=str)
@pytest.mark.parametrize("pairs_at_once", [1, 7, 10**6])
def test_numbers_that_leave_the_range_of_the_parts_are_decided_one_by_one(
    largest: float, pairs_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.saes.screen.NUMBERS_AT_ONCE", pairs_at_once * D_IN)
    rows = some_rows(torch.float32)
    rows[4, 2] = largest
    coder = make_coder()
    exact = exact_before(coder, rows) > coder.threshold
    np.testing.assert_array_equal(fired(ScreenEncoder(coder, "cpu").encode(rows)), exact)


NORMAL = st.floats(2.0**-100, 2.0**100, width=32) | st.floats(-(2.0**100), -(2.0**-100), width=32) | st.just(0.0)


@given(st_numpy.arrays(np.float32, 20, elements=NORMAL))
def test_a_number_is_the_sum_of_its_parts(values: npt.NDArray[np.float32]) -> None:
    parts = split(torch.from_numpy(values))
    assert {part.dtype for part in parts} == {torch.bfloat16}
    np.testing.assert_array_equal(sum(part.double().numpy() for part in parts), values.astype(np.float64))


def test_nothing_fires() -> None:
    coder = make_coder(np.full(D_SAE, 1e9, np.float32))
    rows = some_rows(torch.float32)
    tile = ScreenEncoder(coder, "cpu").encode(rows)
    assert not tile.counts.any() and not len(tile.features) and not tile.reconstruction[:, 0].any()
    error = (rows - torch.from_numpy(coder.b_dec)).norm(dim=1)
    np.testing.assert_allclose(tile.reconstruction[:, 2].numpy(), error.numpy(), rtol=1e-6)


def test_a_coder_that_keeps_the_largest_is_refused() -> None:
    with pytest.raises(InvalidInput, match="keeps the 5 largest"):
        ScreenEncoder(make_coder(k=5), "cpu")


def neurons() -> NeuronEncoder:
    identity = SaeIdentity(
        sae="n", site="mlp_act.0", width=D_IN, d_in=D_IN, architecture="neurons", weights_digest="0", truncated_to=9
    )
    return NeuronEncoder(identity)


@pytest.mark.parametrize("slots_per_row", [0, 1, 8, 40, D_SAE, 10 * D_SAE])
@pytest.mark.parametrize(
    "encoder",
    [SaeEncoder(make_coder(), "cpu"), ScreenEncoder(make_coder(), "cpu"), neurons()],
    ids=["float32", "screen", "neurons"],
)
def test_slots_change_no_bit_whether_they_suffice_or_not(encoder: Encoder, slots_per_row: int) -> None:
    rows = torch.cat([some_rows(torch.float32), torch.zeros(N_ROWS, D_IN), 30 * some_rows(torch.float32, seed=9)])
    rows[2, 0] = torch.nan
    listed = torch.arange(len(rows)) % 5 != 0
    cut = list(zip(torch.split(rows, N_ROWS), torch.split(listed, N_ROWS), strict=True))
    for found, (tile_rows, tile_listed) in zip(encoded_tiles([encoder], cut, slots_per_row)[0], cut, strict=True):
        expected = encoder.encode(tile_rows, tile_listed)
        for name in ("counts", "features", "activations", "reconstruction"):
            one, other = getattr(found, name), getattr(expected, name)
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_firings_of_rows_that_are_not_listed_may_be_what_does_not_fit() -> None:
    encoder, rows = SaeEncoder(make_coder(), "cpu"), some_rows(torch.float32)
    counts = encoder.encode(rows).counts
    last = torch.arange(N_ROWS) == N_ROWS - 1
    assert 0 < counts[last] <= N_ROWS < counts.sum()
    ((found,),), expected = encoded_tiles([encoder], [(rows, last)], 1), encoder.encode(rows, last)
    assert torch.equal(found.features, expected.features) and torch.equal(found.activations, expected.activations)
    assert torch.equal(found.reconstruction, expected.reconstruction)


def test_slots_hold_the_first_firings() -> None:
    encoder, rows = SaeEncoder(make_coder(), "cpu"), some_rows(torch.float32)
    whole, few, many = (encoder.encode(rows, n_slots=n_slots) for n_slots in (None, 7, 10**9))
    assert len(whole.features) > 7 and len(few.features) == 7 and len(many.features) == N_ROWS * D_SAE
    for tile in (few, many.first(len(whole.features))):
        n_firings = len(tile.features)
        assert torch.equal(tile.counts, whole.counts)
        assert torch.equal(tile.features, whole.features[:n_firings])
        assert torch.equal(tile.activations, whole.activations[:n_firings])
