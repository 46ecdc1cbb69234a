"""The AnnData layout, element by element, into HDF5 or Zarr: columns and matrices that grow while they are written.

What is written here is `anndata` 0.1.0, `dataframe` 0.2.0, `csr_matrix` 0.1.0, `categorical`, `array`, `string-array`
and `string` 0.2.0 of AnnData's format: https://anndata.readthedocs.io/en/stable/fileformat-prose.html
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.errors import MissingDependency, explain

__all__ = ["TEXT", "Column", "Hierarchy", "encoded", "new_hierarchy"]

TEXT = "text"  # the type of a column of texts; every other is a numpy type
CHUNK = 1 << 20  # values; Zarr rewrites no chunk that is full

Attributes = Mapping[str, Any]


class Hierarchy(ABC):
    """Groups and arrays with attributes, in HDF5 or Zarr."""

    @abstractmethod
    def group(self, path: str, attributes: Attributes) -> None:
        """Make a group; the empty path is the root."""

    @abstractmethod
    def array(self, path: str, kind: str, attributes: Attributes) -> Any:
        """Make an empty one-dimensional array of a type; return it."""

    @abstractmethod
    def scalar(self, path: str, text: str) -> None:
        """Make a text that stands alone."""

    @abstractmethod
    def resize(self, array: Any, length: int) -> None:
        """Give a one-dimensional array another length."""

    @abstractmethod
    def matrix(self, path: str, values: npt.NDArray[Any]) -> None:
        """Make an array that is known whole."""

    def sparse(self, path: str) -> None:
        """Make a CSR matrix without its arrays `data`, `indices`, `indptr`."""
        self.group(path, encoded("csr_matrix", "0.1.0"))

    def shape(self, path: str, *shape: int) -> None:
        """Say the shape of a CSR matrix, now that it is known."""
        self.group(path, {"shape": list(shape)})

    def dataframe(self, path: str, columns: Sequence[str]) -> None:
        """Make a data frame without its columns; its index is the column `_index`."""
        self.group(path, encoded("dataframe") | {"_index": "_index", "column-order": list(columns)})

    def column(self, path: str, kind: str) -> Column:
        """Make a column of a data frame, of numbers or texts, to be appended to."""
        return Column(self, path, kind, encoded("string-array" if kind == TEXT else "array"))

    def categorical(self, path: str, categories: Sequence[str]) -> Column:
        """Make a column of codes for `categories`, to be appended to; -1 is a missing value."""
        self.group(path, encoded("categorical") | {"ordered": False})
        with self.column(f"{path}/categories", TEXT) as column:
            column.append(np.array(categories, dtype=object))
        return self.column(f"{path}/codes", "int32")

    def nullable_integers(self, path: str) -> tuple[Column, Column]:
        """Make a column of integers some of which are missing: the values, and a mask that is true where they are."""
        self.group(path, encoded("nullable-integer", "0.1.0"))
        return self.column(f"{path}/values", "int64"), self.column(f"{path}/mask", "bool")

    def plain(self, path: str, kind: str) -> Column:
        """Make an array that is part of a larger element, to be appended to."""
        return Column(self, path, kind, {})


def encoded(kind: str, version: str = "0.2.0") -> dict[str, Any]:
    """Return the attributes by which AnnData knows what an element is."""
    return {"encoding-type": kind, "encoding-version": version}


class Column:
    """An array that grows; it holds back less than a chunk. A context manager, complete when left."""

    def __init__(self, hierarchy: Hierarchy, path: str, kind: str, attributes: Attributes) -> None:
        self._hierarchy, self.kind = hierarchy, kind
        self._array = hierarchy.array(path, kind, attributes)
        self._held: list[npt.NDArray[Any]] = []
        self._n_held = self.length = 0

    def __enter__(self) -> Column:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush(self._n_held)

    def append(self, values: npt.NDArray[Any]) -> None:
        """Append values: (length)."""
        self._held.append(values if self.kind == TEXT else values.astype(self.kind, copy=False))
        self._n_held += len(values)
        if self._n_held >= CHUNK:
            self._flush(self._n_held // CHUNK * CHUNK)

    def _flush(self, count: int) -> None:
        if count:
            held = np.concatenate(self._held)
            self._hierarchy.resize(self._array, self.length + count)
            self._array[self.length : self.length + count] = held[:count]
            self._held, self._n_held = [held[count:]], len(held) - count
            self.length += count


class _Hdf5(Hierarchy):
    def __init__(self, file: Any, h5py: Any) -> None:
        self._file, self._text = file, h5py.string_dtype()

    def group(self, path: str, attributes: Attributes) -> None:
        group = self._file.require_group(path) if path else self._file
        for name, value in attributes.items():
            texts = isinstance(value, list) and any(isinstance(one, str) for one in value)
            group.attrs.create(name, value, dtype=self._text if texts else None)

    def array(self, path: str, kind: str, attributes: Attributes) -> Any:
        dtype = self._text if kind == TEXT else np.dtype(kind)
        packed = {"chunks": (CHUNK >> 4,), "shuffle": True, "compression": "gzip", "compression_opts": 1}
        array = self._file.create_dataset(path, shape=(0,), maxshape=(None,), dtype=dtype, **packed)
        array.attrs.update(attributes)
        return array

    def scalar(self, path: str, text: str) -> None:
        self._file.create_dataset(path, data=text, dtype=self._text).attrs.update(encoded("string"))

    def resize(self, array: Any, length: int) -> None:
        array.resize((length,))

    def matrix(self, path: str, values: npt.NDArray[Any]) -> None:
        self._file.create_dataset(path, data=values, compression="gzip").attrs.update(encoded("array"))


class _Zarr(Hierarchy):
    def __init__(self, root: Any) -> None:
        self._root = root

    def group(self, path: str, attributes: Attributes) -> None:
        group = self._root.require_group(path) if path else self._root
        group.attrs.update(attributes)

    def array(self, path: str, kind: str, attributes: Attributes) -> Any:
        dtype = "string" if kind == TEXT else kind
        return self._root.create_array(path, shape=(0,), chunks=(CHUNK,), dtype=dtype, attributes=dict(attributes))

    def scalar(self, path: str, text: str) -> None:
        array = self._root.create_array(path, shape=(), dtype="string", attributes=encoded("string"))
        array[...] = text

    def resize(self, array: Any, length: int) -> None:
        array.resize((length,))

    def matrix(self, path: str, values: npt.NDArray[Any]) -> None:
        self._root.create_array(path, data=values, attributes=encoded("array"))


@contextmanager
def new_hierarchy(path: Path, suffix: str) -> Iterator[Hierarchy]:
    """Give an empty hierarchy at `path`: HDF5 for the suffix `.h5ad`, a Zarr v3 directory for `.zarr`.

    Raises MissingDependency where h5py is needed and not installed.
    """
    if suffix == ".zarr":
        import zarr

        yield _Zarr(zarr.create_group(path))
        return
    try:
        import h5py
    except ImportError as error:
        next_step = "pip install h5py, or pip install 'actstore[notebook]'; or choose a path that ends in .zarr"
        raise MissingDependency(explain("h5py is not installed", next_step=next_step)) from error
    with h5py.File(path, "x") as file:
        yield _Hdf5(file, h5py)
