"""Stored numbers as a store gives them to numpy and SciPy: a site's rows, an SAE's firings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, explain
from .lenses import Functions
from .store import StoreReader

if TYPE_CHECKING:
    import scipy.sparse
    import zarr

__all__ = ["Activations", "SiteView"]


class SiteView:
    """A stored site as rows of numbers: `store["resid_post.20"][rows]`."""

    def __init__(self, functions: Functions, site: str) -> None:
        self._functions = functions
        self.site = site
        self.zarr: zarr.Array[Any] = functions.reader.array(f"sites/{site}")
        """The raw array (row, width) in its stored dtype, filler included."""

    @property
    def width(self) -> int:
        return int(self.zarr.shape[1])

    def __getitem__(self, rows: int | slice | npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return these rows as float32: (row, width), or (width) for a single row.

        A slice takes the rows in use that lie in it. Raises UnknownName for rows that do not exist or are filler.
        """
        numbers = _row_numbers(self._functions.reader, rows)
        vectors = self._functions.vectors(self.site, np.atleast_1d(numbers))
        return vectors[0] if numbers.ndim == 0 else vectors


class Activations:
    """The firings of one SAE, row-major: SciPy CSR matrices, a shard at a time."""

    def __init__(self, reader: StoreReader, sae: str, n_features: int) -> None:
        self._reader, self.sae, self.n_features = reader, sae, n_features

    @property
    def shards(self) -> list[int]:
        """The shards that are stored."""
        return list(self._reader.done(f"firings/{self.sae}"))

    def shard(self, shard: int) -> scipy.sparse.csr_array[Any]:
        """Return one shard as float32 CSR (row of the shard, feature); filler rows are empty."""
        import scipy.sparse

        one = self._reader.firings_cached(self.sae, shard)
        shape = (one.n_rows, self.n_features)
        return scipy.sparse.csr_array((one.activations, one.features.astype(np.int32), one.indptr), shape=shape)

    def __getitem__(self, rows: int | slice | npt.ArrayLike) -> scipy.sparse.csr_array[Any]:
        """Return these rows, in the order asked for, as float32 CSR (row, feature).

        A slice takes the rows in use that lie in it. Raises UnknownName for rows that do not exist or are filler.
        """
        import scipy.sparse

        numbers = np.atleast_1d(_row_numbers(self._reader, rows))
        self._reader.token_column("seq", numbers)  # raises for a row that does not exist
        shards, places = np.divmod(numbers, self._reader.shard_rows)
        parts, orders = [], []
        for shard in np.unique(shards):
            orders.append(np.flatnonzero(shards == shard))
            parts.append(self.shard(int(shard))[places[orders[-1]]])
        if not parts:
            return scipy.sparse.csr_array(np.zeros((0, self.n_features), dtype=np.float32))
        order = np.argsort(np.concatenate(orders), kind="stable")
        rows_of_shards = scipy.sparse.csr_matrix(scipy.sparse.vstack(parts, format="csr"))
        return scipy.sparse.csr_array(rows_of_shards[order, :])


def _row_numbers(reader: StoreReader, rows: int | slice | npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return rows as int64 (row), or as a single number; a slice becomes the rows in use that lie in it."""
    if isinstance(rows, slice):
        wanted = np.arange(*rows.indices(reader.layout.n_shards * reader.shard_rows), dtype=np.int64)
        shards, offsets = np.divmod(wanted, reader.shard_rows)
        return wanted[offsets < reader.rows_used[shards]]
    numbers = np.asarray(rows)
    if numbers.ndim > 1 or not (np.issubdtype(numbers.dtype, np.integer) or numbers.size == 0):
        what = f"Rows are numbers, not {numbers.dtype} of shape {numbers.shape}"
        raise InvalidInput(explain(what, accepted="an integer, a list or vector of integers, or a slice"))
    return numbers.astype(np.int64)
