"""The shares of some rows' logits, collected part by part, and the lists that SQL gets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .columns import ragged

__all__ = ["ATTRIBUTION_TYPE", "Shares"]

ATTRIBUTION_TYPE = pa.list_(
    pa.struct(
        [
            ("component", pa.string()),
            ("layer", pa.int32()),
            ("head", pa.int32()),
            ("feature", pa.int32()),
            ("contribution", pa.float64()),
        ]
    )
)
NONE = -1  # of layer, head and feature: NULL

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Share:
    """Contributions float64 (share) of one component to the rows `of_row`; features of them, or NONE."""

    component: str
    layer: int
    head: int
    of_row: npt.NDArray[np.intp]
    features: npt.NDArray[np.int64]
    values: Values


class Shares:
    """What parts of the model add to the logits of `n_rows` rows."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows
        self._shares: list[_Share] = []

    def add(self, component: str, values: Values, layer: int | None = None, head: int = NONE) -> None:
        """Add a part's share of every row: float64 (row)."""
        rows = np.arange(self._n_rows)
        self._add(component, layer, head, rows, np.full(self._n_rows, NONE), values)

    def add_features(
        self, of_row: npt.NDArray[np.intp], features: npt.NDArray[np.int64], values: Values, layer: int | None
    ) -> None:
        """Add the shares of features, each of one row: float64 (firing)."""
        self._add("feature", layer, NONE, of_row, features, values)

    def _add(self, component: str, layer: int | None, head: int, *columns: npt.NDArray[np.generic]) -> None:
        of_row, features, values = columns
        self._shares.append(_Share(component, NONE if layer is None else layer, head, of_row, features, values))  # type: ignore[arg-type]

    def total(self) -> Values:
        """Return the sum of each row's shares so far."""
        total = np.zeros(self._n_rows)
        for share in self._shares:
            total += np.bincount(share.of_row, share.values, self._n_rows)
        return total

    def lists(self) -> pa.Array:
        """Return every row's shares, in the order in which they were added."""
        counts = np.array([len(share.values) for share in self._shares])
        of_row = np.concatenate([share.of_row for share in self._shares])
        order = pa.array(np.argsort(of_row, kind="stable"))
        names = pa.array([share.component for share in self._shares]).take(
            pa.array(np.repeat(np.arange(len(counts)), counts))
        )
        layers = np.repeat([share.layer for share in self._shares], counts)
        heads = np.repeat([share.head for share in self._shares], counts)
        features = np.concatenate([share.features for share in self._shares])
        values = np.concatenate([share.values for share in self._shares])
        columns = [names, *map(_numbers, (layers, heads, features)), pa.array(values, pa.float64())]
        structs = pa.StructArray.from_arrays(columns, fields=list(ATTRIBUTION_TYPE.value_type)).take(order)
        return ragged(np.bincount(of_row, minlength=self._n_rows), structs)


def _numbers(values: npt.NDArray[np.int64]) -> pa.Array:
    return pa.array(values.astype(np.int32), mask=values == NONE)
