"""Exact statistics of features, in numpy: what `features` and `examples` say, from a block of firings.

A block is a set of whole features. Firings may come weighted (distinct activations with how often each occurs), so
that a feature with more firings than memory holds is summarised by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

__all__ = [
    "EXAMPLES",
    "HISTOGRAM_BINS",
    "FeatureSummary",
    "Values",
    "decoded",
    "summarise",
    "top_rows",
    "weakest_examples",
]

EXAMPLES = 100
HISTOGRAM_BINS = 20
PERCENTILES = (50, 90, 99)

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
# Activations as parts store them: float32, or uint16 where they are codes of IEEE halves. All are positive, so that
# their bits are ordered as they are.
Stored = npt.NDArray[Any]


@dataclass(frozen=True)
class Values:
    """Activations of some features, ordered by (feature, activation).

    bounds int64 (feature + 1) into the values; stored (value); keys uint32 or uint64 (value), rising: the feature,
    counted from the block's first, then the bits of `stored`; times int64 (value): how often that activation occurs,
    None where each stands for one firing.
    """

    bounds: Counts
    stored: Stored
    keys: npt.NDArray[Any]
    times: Counts | None = None

    @classmethod
    def of_firings(cls, features: npt.NDArray[np.integer[Any]], stored: Stored, n_features: int) -> Self:
        """Return the values of firings in any order, each once."""
        bounds = np.concatenate([[0], np.cumsum(np.bincount(features, minlength=n_features))])
        # Sorting one key is several times faster than sorting an order by two arrays.
        keys = _keys(features, stored, n_features)
        keys.sort()
        return cls(bounds, keys.astype(_bits(stored).dtype).view(stored.dtype), keys)

    @classmethod
    def of_one_feature(cls, stored: Stored, times: Counts) -> Self:
        """Return the distinct activations of feature 0, given in any order with how often each occurs."""
        order = np.argsort(stored)
        keys = _keys(np.zeros(len(order), np.int64), stored[order], 1)
        return cls(np.array([0, len(order)]), stored[order], keys, times[order])


@dataclass(frozen=True)
class FeatureSummary:
    """Statistics by feature of the block; all zero where a feature never fires.

    n_firings int64, maximum float32, mean and std (of the population) float64: (feature);
    percentiles float32 (feature, PERCENTILES); histogram uint32 (feature, HISTOGRAM_BINS).
    """

    n_firings: Counts
    maximum: npt.NDArray[np.float32]
    mean: Floats
    std: Floats
    percentiles: npt.NDArray[np.float32]
    histogram: npt.NDArray[np.uint32]


def decoded(stored: Stored) -> npt.NDArray[np.float32]:
    """Return stored activations as float32."""
    return (stored.view(np.float16) if stored.dtype == np.uint16 else stored).astype(np.float32, copy=False)


def summarise(values: Values) -> FeatureSummary:
    """Return the statistics of the features of a block.

    Percentile q is the value at place ⌈q·n⌉ of the n sorted ones, counted from 1, as DuckDB's `quantile_disc`.
    Bin b of the histogram counts the activations in (0, maximum] with ⌊bins · activation / maximum⌋ = b, the
    maximum itself in the last bin.
    """
    alive = np.flatnonzero(values.bounds[1:] > values.bounds[:-1])
    activations = decoded(values.stored)
    reached = None if values.times is None else np.concatenate([[0], np.cumsum(values.times)])
    n_firings = np.diff(values.bounds if reached is None else reached[values.bounds])
    maximum = np.zeros(len(n_firings), np.float32)
    maximum[alive] = activations[values.bounds[1:][alive] - 1]
    mean, variance = _moments(values, activations, n_firings, alive)
    percentiles = _percentiles(values, activations, reached, n_firings, alive)
    histogram = np.zeros((len(n_firings), HISTOGRAM_BINS), np.uint32)
    histogram[alive] = _histogram(values, reached, maximum, alive)
    return FeatureSummary(n_firings, maximum, mean, np.sqrt(variance), percentiles, histogram)


def weakest_examples(values: Values) -> Stored:
    """Return by feature the EXAMPLES-th strongest activation, the weakest where there are fewer, 0 where there is none.

    As stored; the values are of firings, each once.
    """
    bounds = values.bounds
    alive = bounds[1:] > bounds[:-1]
    weakest = np.zeros(len(alive), values.stored.dtype)
    weakest[alive] = values.stored[np.maximum(bounds[1:] - EXAMPLES, bounds[:-1])[alive]]
    return weakest


def top_rows(
    features: npt.NDArray[np.integer[Any]],
    stored: Stored,
    rows: npt.NDArray[np.int64],
    weakest: Stored,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return places of the EXAMPLES strongest firings of each feature, ties by row, and their ranks from 1.

    Places int64 (example) index the first three arrays, in the order (feature, rank); `weakest` is `weakest_examples`.
    """
    candidates = np.flatnonzero(stored >= weakest[features])
    candidates = candidates[np.argsort(rows[candidates])]
    weakness = ~_bits(stored[candidates])
    candidates = candidates[_stable_order(_keys(features[candidates], weakness, len(weakest)))]
    firsts = np.searchsorted(features[candidates], np.arange(len(weakest)))
    ranks = np.arange(1, len(candidates) + 1) - firsts[features[candidates]]
    kept = ranks <= EXAMPLES
    return candidates[kept], ranks[kept].astype(np.int32)


def _moments(
    values: Values, activations: npt.NDArray[np.float32], n_firings: Counts, alive: Counts
) -> tuple[Floats, Floats]:
    """Return mean and variance by feature; every sum runs over one feature's values alone, whatever the block."""
    mean, variance = np.zeros((2, len(n_firings)))
    if not len(alive):
        return mean, variance
    exact = activations.astype(np.float64)
    times = 1 if values.times is None else values.times
    starts = values.bounds[:-1][alive]
    mean[alive] = np.add.reduceat(exact * times, starts) / n_firings[alive]
    deviation = exact - np.repeat(mean, np.diff(values.bounds))
    deviation *= deviation
    variance[alive] = np.add.reduceat(deviation * times, starts) / n_firings[alive]
    return mean, variance


def _percentiles(
    values: Values, activations: npt.NDArray[np.float32], reached: Counts | None, n_firings: Counts, alive: Counts
) -> npt.NDArray[np.float32]:
    before = np.cumsum(n_firings) - n_firings
    percentiles = np.zeros((len(n_firings), len(PERCENTILES)), np.float32)
    for column, percent in enumerate(PERCENTILES):
        place = (before + -(-n_firings * percent // 100))[alive]
        percentiles[alive, column] = activations[(place if reached is None else np.searchsorted(reached, place)) - 1]
    return percentiles


def _histogram(
    values: Values, reached: Counts | None, maximum: npt.NDArray[np.float32], alive: Counts
) -> npt.NDArray[np.int64]:
    """Return the bins of the features that fire; values are sorted, so that only the bins' edges are looked up."""
    edges = _edges(maximum[alive], values.stored.dtype)
    features = np.repeat(alive, HISTOGRAM_BINS - 1)
    places = np.searchsorted(values.keys, _keys(features, edges.reshape(-1), len(maximum)))
    bounds = values.bounds[alive], places.reshape(edges.shape), values.bounds[alive + 1]
    joined = np.column_stack(bounds)
    return np.diff(joined if reached is None else reached[joined])


def _edges(maximum: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> Stored:
    """Return the least value, as stored, of every bin but the first: (feature, bin)."""
    bins = np.arange(1, HISTOGRAM_BINS)
    largest = maximum.astype(np.float64)[:, None]
    near = (largest * bins / HISTOGRAM_BINS).astype(np.float32)
    edges = np.nextafter(near, np.float32(np.inf))
    # A quotient is off by less than one step of float32, so the least value of a bin is this one or a neighbour.
    for tried in (near, np.nextafter(near, np.float32(0))):
        edges = np.where((tried / largest * HISTOGRAM_BINS).astype(np.int64) >= bins, tried, edges)
    if dtype != np.uint16:
        return edges
    codes = edges.astype(np.float16).view(np.uint16)
    return codes + (decoded(codes) < edges).astype(np.uint16)


def _keys(features: npt.NDArray[np.integer[Any]], stored: Stored, n_features: int) -> npt.NDArray[Any]:
    """Return features and bits of what is stored in one number: of few features' halves it is half as wide."""
    kind, width = (np.uint32, 16) if stored.dtype == np.uint16 and n_features <= 1 << 16 else (np.uint64, 32)
    keys: npt.NDArray[Any] = features.astype(kind)
    keys <<= kind(width)
    keys |= _bits(stored)
    return keys


def _stable_order(keys: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the order that sorts keys, ties as they come."""
    if keys.dtype == np.uint64:
        return np.argsort(keys, kind="stable")
    # Narrow keys with their place behind them are all different: sorting such numbers is ten times faster.
    placed = np.sort(keys.astype(np.uint64) << np.uint64(32) | np.arange(len(keys), dtype=np.uint64))
    return (placed & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _bits(stored: Stored) -> npt.NDArray[Any]:
    return stored.view(np.uint16 if stored.dtype == np.uint16 else np.uint32)
