"""An open file of weights, whatever its container: the headers first, then the arrays that are wanted."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from .declaration import Arrays
from .npz import ArrayHeader, read_arrays, read_headers
from .pickled import PickledHeader, read_pickled, read_pickled_headers
from .tensors import TensorHeader, read_tensor_headers, read_tensors

__all__ = ["Weights", "open_weights"]

Header = TypeVar("Header", ArrayHeader, PickledHeader, TensorHeader)


@dataclass(frozen=True)
class Weights(Generic[Header]):
    """Headers by the names in the file, and how to read arrays, under any names, by their headers."""

    headers: Mapping[str, Header]
    read: Callable[[Mapping[str, Header]], Arrays]


@contextmanager
def open_weights(file: io.BufferedReader, suffix: str, values: Collection[str] = ()) -> Iterator[Weights[Any]]:
    """Read the headers of an open `.npz`, `.pt` or `.safetensors`; raises Unreadable or BadZipFile for others.

    values: keys of a `.pt` that are no arrays, and are left out.
    """
    n_bytes = os.fstat(file.fileno()).st_size
    if suffix == ".npz":
        with zipfile.ZipFile(file) as archive:
            yield Weights(read_headers(archive, n_bytes), partial(read_arrays, archive))
    elif suffix == ".pt":
        yield Weights(read_pickled_headers(file, n_bytes, values), partial(read_pickled, file))
    else:
        yield Weights(read_tensor_headers(file, n_bytes), partial(read_tensors, file))
