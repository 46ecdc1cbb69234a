"""Exact statistics of features, in numpy: what `features` and `examples` say, from a block of firings.

A block is a set of whole features. Firings may come weighted (distinct activations with how often each occurs), so
that a feature with more firings than memory holds is summarised by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

__all__ = ["EXAMPLES", "HISTOGRAM_BINS", "FeatureSummary", "Values", "summarise", "top_rows", "weakest_examples"]

EXAMPLES = 100
HISTOGRAM_BINS = 20
PERCENTILES = (50, 90, 99)

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Values:
    """Activations of some features, ordered by (feature, activation).

    features int64 (value), counted from the block's first; activations float32 > 0 (value); times int64 (value): how
    often that activation occurs.
    """

    features: npt.NDArray[np.int64]
    activations: npt.NDArray[np.float32]
    times: Counts

    @classmethod
    def of_firings(cls, features: npt.NDArray[np.int64], activations: npt.NDArray[np.float32]) -> Self:
        """Return the values of firings in any order, each once."""
        # Sorting one key is several times faster than sorting an order by two arrays.
        keys = np.sort((features << 32) | _bits(activations))
        ordered = (keys & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
        return cls(keys >> 32, ordered, np.ones(len(keys), np.int64))

    @classmethod
    def of_one_feature(cls, activations: npt.NDArray[np.float32], times: Counts) -> Self:
        """Return the distinct activations of feature 0, given in any order with how often each occurs."""
        order = np.argsort(activations)
        return cls(np.zeros(len(order), np.int64), activations[order], times[order])


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


def summarise(values: Values, n_features: int) -> FeatureSummary:
    """Return the statistics of the features 0…n_features−1 of a block.

    Percentile q is the value at place ⌈q·n⌉ of the n sorted ones, counted from 1, as DuckDB's `quantile_disc`.
    Bin b of the histogram counts the activations in (0, maximum] with ⌊bins · activation / maximum⌋ = b, the
    maximum itself in the last bin.
    """
    features, activations, times = values.features, values.activations.astype(np.float64), values.times
    ends = np.searchsorted(features, np.arange(n_features), side="right")
    reached = np.concatenate([[0], np.cumsum(times)])
    n_firings = np.diff(reached[np.concatenate([[0], ends])])
    alive = n_firings > 0
    maximum = np.zeros(n_features, np.float32)
    maximum[alive] = values.activations[ends[alive] - 1]
    divisor = np.maximum(n_firings, 1)
    mean = np.bincount(features, activations * times, n_features) / divisor
    deviation = np.bincount(features, (activations - mean[features]) ** 2 * times, n_features) / divisor
    percentiles = _percentiles(values.activations, reached, n_firings)
    histogram = _histogram(features, activations, times, maximum)
    return FeatureSummary(n_firings, maximum, mean, np.sqrt(deviation), percentiles, histogram)


def weakest_examples(values: Values, n_features: int) -> npt.NDArray[np.float32]:
    """Return by feature the EXAMPLES-th strongest activation, the weakest where there are fewer, 0 where there is none.

    The values are of firings, each once.
    """
    bounds = np.searchsorted(values.features, np.arange(n_features + 1))
    alive = bounds[1:] > bounds[:-1]
    weakest = np.zeros(n_features, np.float32)
    weakest[alive] = values.activations[np.maximum(bounds[1:] - EXAMPLES, bounds[:-1])[alive]]
    return weakest


def top_rows(
    features: npt.NDArray[np.int64],
    activations: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    weakest: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return places of the EXAMPLES strongest firings of each feature, ties by row, and their ranks from 1.

    Places int64 (example) index the first three arrays, in the order (feature, rank); `weakest` is `weakest_examples`.
    """
    candidates = np.flatnonzero(activations >= weakest[features])
    order = np.lexsort((rows[candidates], -activations[candidates], features[candidates]))
    candidates = candidates[order]
    firsts = np.searchsorted(features[candidates], np.arange(len(weakest)))
    ranks = np.arange(1, len(candidates) + 1) - firsts[features[candidates]]
    kept = ranks <= EXAMPLES
    return candidates[kept], ranks[kept].astype(np.int32)


def _percentiles(activations: npt.NDArray[np.float32], reached: Counts, n_firings: Counts) -> npt.NDArray[np.float32]:
    before = np.concatenate([[0], np.cumsum(n_firings)[:-1]])
    percentiles = np.zeros((len(n_firings), len(PERCENTILES)), np.float32)
    alive = n_firings > 0
    for column, percent in enumerate(PERCENTILES):
        place = before + -(-n_firings * percent // 100)
        percentiles[alive, column] = activations[np.searchsorted(reached, place[alive]) - 1]
    return percentiles


def _histogram(
    features: npt.NDArray[np.int64], activations: Floats, times: Counts, maximum: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint32]:
    share = activations / maximum.astype(np.float64)[features]
    bins = np.minimum((share * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)
    counted = np.bincount(features * HISTOGRAM_BINS + bins, times, len(maximum) * HISTOGRAM_BINS)
    return counted.reshape(-1, HISTOGRAM_BINS).astype(np.uint32)


def _bits(activations: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    # The bits of positive floats are ordered as the floats are.
    return activations.view(np.uint32).astype(np.int64)
