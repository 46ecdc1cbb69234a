"""Firings as one dense matrix, and ranked answers compared with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
from asking_support import Truth


@dataclass(frozen=True)
class Dense:
    """Every firing of an SAE as float64 (row in use, feature), 0 where nothing fires; rows by place, not by number."""

    truth: Truth
    sae: str
    n_features: int

    @cached_property
    def values(self) -> np.ndarray:
        fired = self.truth.firings(self.sae)
        values: np.ndarray = np.zeros((len(self.truth.rows), self.n_features))
        values[self.truth.places(fired.row), fired.feature] = fired.activation
        return values

    @cached_property
    def plain(self) -> np.ndarray:
        """The rows that count in statistics: (plain row, feature)."""
        return np.asarray(self.values[self.truth.plain])

    @property
    def density(self) -> np.ndarray:
        return np.asarray((self.plain > 0).mean(axis=0))

    def places_of_tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Return the places of plain rows whose token is shown as one of these texts."""
        ids = [self.truth.vocabulary.index(text) for text in texts]
        return np.flatnonzero(self.truth.plain & np.isin(self.truth.field("token_id"), ids))

    def documents(self, docs: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Return those documents that have plain rows, and their plain rows' mean activations (document, feature)."""
        plain_of = {doc: self.truth.plain & (self.truth.doc == doc) for doc in docs}
        kept = [doc for doc in docs if plain_of[doc].any()]
        return kept, np.array([self.values[plain_of[doc]].mean(axis=0) for doc in kept])


def assert_ranked(
    found: list[dict[str, Any]],
    expected: Mapping[Any, Mapping[str, Any]],
    by: str,
    k: int,
    *ties: str,
    key: str = "feature",
) -> None:
    """Assert that an answer is the k highest of `expected` by a column (of either sign), each with its values.

    Ties go by further columns, highest first, then by key; what differs by rounding alone is a tie.
    """

    def place(name: Any) -> tuple[float, ...]:
        values = (expected[name][one] for one in (by, *ties))
        return (*(-round(float(value), 9) for value in values), name)

    assert [row[key] for row in found] == sorted(expected, key=place)[:k]
    for row in found:
        for column, value in expected[row[key]].items():
            if column in row:
                wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-9, abs=1e-12)
                assert row[column] == wanted, (row[key], column)
