"""Firings on their way into a part: a block in the order (feature, row), as numpy holds it and as DuckDB stores it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .ahead import behind
from .parts import PartWriter

__all__ = ["Firings", "append_firings", "firing_types"]

FIRINGS_PER_RUN = 64
BLOCKS_WAITING = 6  # DuckDB takes several together, which takes as long as making six


@dataclass(frozen=True)
class Firings:
    """Some firings of the features from `first` on.

    features int32 (firing), counted from `first`; rows int64; stored, codes of halves uint16 or float32; plain bool.
    """

    first: int
    features: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]
    stored: npt.NDArray[Any]
    plain: npt.NDArray[np.bool_]

    def only_plain(self) -> Firings:
        """Return the firings on plain rows."""
        return self if self.plain.all() else self._taken(np.flatnonzero(self.plain))

    def ordered(self) -> Firings:
        """Return the firings in the order (feature, row)."""
        # What comes from one part is in order, and a stable sort makes use of such runs; rows are below 2⁴⁷.
        return self._taken(np.argsort(self.features.astype(np.int64) << 47 | self.rows, kind="stable"))

    def _taken(self, places: npt.NDArray[np.int64]) -> Firings:
        return Firings(self.first, self.features[places], self.rows[places], self.stored[places], self.plain[places])

    def table(self) -> pa.Table:
        """Return the columns of the table `firings`."""
        columns = {"feature": self.features + np.int32(self.first), "row": self.rows, "activation": self.stored}
        return pa.table({**columns, "plain": self.plain})


def firing_types(half: bool, n_firings: int, n_features: int, n_marked: int) -> Mapping[str, str]:
    """Return the types of columns with the compression that DuckDB would choose, found without trying all of them.

    `n_marked` firings are not plain. Where runs of equal values may be short, DuckDB is left to try.
    """
    runs = {"feature": n_firings > FIRINGS_PER_RUN * n_features, "plain": n_firings > FIRINGS_PER_RUN * n_marked}
    kinds = {"feature": "INTEGER", "plain": "BOOLEAN"}
    return {
        **{column: f"{kind} USING COMPRESSION rle" if runs[column] else kind for column, kind in kinds.items()},
        "row": "BIGINT USING COMPRESSION bitpacking",
        "activation": "USMALLINT USING COMPRESSION bitpacking" if half else "FLOAT",
    }


def append_firings(writer: PartWriter, blocks: Iterator[Firings]) -> None:
    """Append blocks in their order; while DuckDB compresses some, the next are made."""
    behind(lambda firings: writer.append("firings", firings.table()), blocks, BLOCKS_WAITING)
