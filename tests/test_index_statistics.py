"""Statistics of features, against DuckDB's own quantiles and one-by-one Python."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.index.firing_parts import half_codes
from actstore.index.statistics import EXAMPLES, HISTOGRAM_BINS, Values, decoded, summarise, top_rows, weakest_examples

ACTIVATIONS = st.floats(2.0**-24, 2.0**20, width=32)
FIRINGS = st.lists(st.tuples(st.integers(0, 4), st.one_of(ACTIVATIONS, st.sampled_from([1.0, 2.0]))), max_size=60)


def _arrays(firings: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    features = np.array([feature for feature, _ in firings], np.int64)
    return features, np.array([activation for _, activation in firings], np.float32)


@given(FIRINGS)
@settings(max_examples=60, deadline=None)
def test_every_statistic_is_what_plain_python_says(firings: list[tuple[int, float]]) -> None:
    features, activations = _arrays(firings)
    summary = summarise(Values.of_firings(features, activations, 6))
    for feature in range(6):
        own = sorted(float(a) for f, a in zip(features, activations, strict=True) if f == feature)
        assert summary.n_firings[feature] == len(own)
        if not own:
            assert not summary.maximum[feature] and not summary.mean[feature] and not summary.std[feature]
            assert not summary.percentiles[feature].any() and not summary.histogram[feature].any()
            continue
        mean = math.fsum(own) / len(own)
        assert summary.maximum[feature] == own[-1]
        assert summary.mean[feature] == pytest.approx(mean, rel=1e-12)
        std = math.sqrt(math.fsum((a - mean) ** 2 for a in own) / len(own))
        assert summary.std[feature] == pytest.approx(std, rel=1e-9, abs=1e-9 * mean)
        assert summary.percentiles[feature].tolist() == [own[math.ceil(len(own) * p / 100) - 1] for p in (50, 90, 99)]
        bins = Counter(min(int(a / own[-1] * HISTOGRAM_BINS), HISTOGRAM_BINS - 1) for a in own)
        assert summary.histogram[feature].tolist() == [bins[b] for b in range(HISTOGRAM_BINS)]


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11, 99, 100, 101, 1000])
def test_percentiles_are_duckdbs_quantile_disc(count: int) -> None:
    activations = np.random.default_rng(count).random(count).astype(np.float32) + np.float32(0.5)
    summary = summarise(Values.of_firings(np.zeros(count, np.int64), activations, 1))
    with duckdb.connect() as connection:
        connection.register("v", pa.table({"a": activations}))
        query = "SELECT quantile_disc(a, 0.5), quantile_disc(a, 0.9), quantile_disc(a, 0.99) FROM v"
        assert [tuple(summary.percentiles[0].tolist())] == connection.sql(query).fetchall()


def test_distinct_activations_with_counts_say_the_same_as_firings() -> None:
    activations = np.random.default_rng(0).choice(np.arange(1, 30) / 8, 5000).astype(np.float32)
    distinct, times = np.unique(activations, return_counts=True)
    shuffled = np.random.default_rng(1).permutation(len(distinct))
    counted = summarise(Values.of_one_feature(distinct[shuffled], times[shuffled]))
    listed = summarise(Values.of_firings(np.zeros(5000, np.int64), activations, 1))
    assert counted.n_firings.tolist() == [5000]
    assert counted.mean == pytest.approx(listed.mean, rel=1e-12) and counted.std == pytest.approx(listed.std, rel=1e-12)
    assert counted.percentiles.tolist() == listed.percentiles.tolist()
    assert counted.histogram.tolist() == listed.histogram.tolist()


@pytest.mark.parametrize("n_features", [7, 70_000], ids=["narrow keys", "more features than a narrow key holds"])
def test_codes_of_halves_say_the_same_as_the_floats_they_stand_for(n_features: int) -> None:
    random = np.random.default_rng(n_features)
    features = random.integers(0, n_features, 20_000)
    codes = random.choice(random.integers(1, 0x7C00, 3000), 20_000).astype(np.uint16)
    rows = random.permutation(20_000).astype(np.int64)
    of_codes, of_floats = (Values.of_firings(features, stored, n_features) for stored in (codes, decoded(codes)))
    assert np.array_equal(decoded(of_codes.stored), of_floats.stored)
    coded, plain = summarise(of_codes), summarise(of_floats)
    for field in dataclasses.fields(plain):
        assert np.array_equal(getattr(coded, field.name), getattr(plain, field.name)), field.name
    places, ranks = top_rows(features, codes, rows, weakest_examples(of_codes))
    places_of_floats, ranks_of_floats = top_rows(features, decoded(codes), rows, weakest_examples(of_floats))
    assert np.array_equal(places, places_of_floats) and np.array_equal(ranks, ranks_of_floats)


@pytest.mark.parametrize("maximum", [1e-45, 7e-45, 2.0**-24, 0.1, 1 / 3, 1.0, 65504.0, 3e38])
def test_activations_at_the_edges_of_bins_fall_where_division_says(maximum: float) -> None:
    largest = np.float32(maximum)
    near = (np.arange(1, HISTOGRAM_BINS) / HISTOGRAM_BINS * np.float64(largest)).astype(np.float32)
    tried = np.concatenate([near, np.nextafter(near, largest), np.nextafter(near, np.float32(0)), [largest]])
    tried = tried[tried > 0]
    (histogram,) = summarise(Values.of_firings(np.zeros(len(tried), np.int64), tried, 1)).histogram
    bins = np.minimum((tried.astype(np.float64) / np.float64(largest) * HISTOGRAM_BINS).astype(int), HISTOGRAM_BINS - 1)
    assert histogram.tolist() == np.bincount(bins, minlength=HISTOGRAM_BINS).tolist()


@pytest.mark.parametrize(
    ("count", "n_values"), [(0, 1), (1, 1), (EXAMPLES, 5), (EXAMPLES + 1, 1), (450, 3), (450, 10_000)]
)
def test_examples_are_the_strongest_with_ties_by_row(count: int, n_values: int) -> None:
    random = np.random.default_rng(count)
    features = random.integers(0, 3, count)
    activations = (random.integers(1, n_values + 1, count) / 4).astype(np.float32)
    rows = random.permutation(count).astype(np.int64)
    weakest = weakest_examples(Values.of_firings(features, activations, 4))
    places, ranks = top_rows(features, activations, rows, weakest)
    found = list(zip(features[places], ranks, rows[places], activations[places], strict=True))
    expected = []
    for feature in range(4):
        own = sorted((-a, r) for f, a, r in zip(features, activations, rows, strict=True) if f == feature)
        expected += [(feature, rank, row, -a) for rank, (a, row) in enumerate(own[:EXAMPLES], 1)]
    assert found == expected


@pytest.mark.parametrize(
    ("activation", "exact"),
    [(1.0, True), (65504.0, True), (2.0**-24, True), (65520.0, False), (2.0**-25, False), (1.0 + 2.0**-11, False)],
)
def test_half_codes_only_where_every_activation_is_a_half(activation: float, exact: bool) -> None:
    codes = half_codes(np.array([0.5, activation], np.float32))
    assert (codes is not None) is exact
