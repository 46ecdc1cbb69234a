"""Read arrays from a `.safetensors` file that nobody vouches for.

The file is eight bytes with the header's length, the header (JSON: type, shape and place of every tensor) and the
tensors, one after the other without a gap. All claims are held against each other and against the size of the file
before memory for a tensor is asked for.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .faults import Unreadable

__all__ = ["TensorHeader", "map_tensor", "read_tensor_headers", "read_tensors"]

_LARGEST_HEADER_BYTES = 1 << 24
_LENGTH_BYTES = 8
_MOST_AXES, _LARGEST_NUMBER = 8, 1 << 48  # of a shape; of a length or a place in the file
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class TensorHeader:
    """What a tensor says of itself, and where in the file it is."""

    type: str
    shape: tuple[int, ...]
    first: int  # byte in the file
    n_bytes: int
    place: int | None = None  # in the second axis, where only this is to be read

    def at(self, place: int) -> TensorHeader:
        """Return the header of one place in the second of three axes: (a, b, c) is read as (a, c)."""
        return replace(self, place=place)

    def faults(self, name: str) -> list[str]:
        """Return what is wrong with the type and the size, without reading the tensor."""
        if self.type not in _DTYPES:
            return [f"{name} is {self.type}, where {' or '.join(_DTYPES)} is read"]
        claimed = math.prod(self.shape) * _DTYPES[self.type].itemsize
        if claimed == self.n_bytes:
            return []
        return [f"{name} claims {claimed:,} bytes by its shape {self.shape} and has {self.n_bytes:,}"]


def read_tensor_headers(file: IO[bytes], file_bytes: int) -> dict[str, TensorHeader]:
    """Return the header of every tensor by its name; raises Unreadable for what is no safetensors file."""
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 2 <= length <= min(_LARGEST_HEADER_BYTES, file_bytes - _LENGTH_BYTES):
        raise Unreadable(["it is not a safetensors file, or is cut short"])
    entries = _parsed(file.read(length))
    headers = {name: _header(name, entry, _LENGTH_BYTES + length) for name, entry in entries.items()}
    faults = [fault for name, header in headers.items() for fault in header.faults(name)]
    if faults := faults + _gaps(headers, _LENGTH_BYTES + length, file_bytes):
        raise Unreadable(faults)
    return headers


def read_tensors(file: IO[bytes], headers: Mapping[str, TensorHeader]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the tensors as float32; float16 and bfloat16 are widened exactly."""
    arrays = {}
    for name, header in headers.items():
        if header.place is not None:
            arrays[name] = np.array(map_tensor(file, header)[:, header.place], dtype=np.float32, order="C")
            continue
        file.seek(header.first)
        read = np.fromfile(file, _DTYPES[header.type], math.prod(header.shape))
        if read.nbytes != header.n_bytes:
            raise Unreadable([f"{name} is cut short"])
        arrays[name] = read.reshape(header.shape).astype(np.float32, copy=False)
    return arrays


def map_tensor(file: IO[bytes], header: TensorHeader) -> npt.NDArray[Any]:
    """Return a tensor as it lies in the file, in its type there: what is not looked at is not read."""
    return np.memmap(file, _DTYPES[header.type], "r", header.first, header.shape)


def _parsed(text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        body = dict(pairs)
        if len(body) < len(pairs):
            twice = (name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise Unreadable([f"{name} is there twice" for name in sorted(twice)])
        return body

    try:
        body = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise Unreadable(["its header cannot be read"]) from error
    if not isinstance(body, dict):
        raise Unreadable(["its header is not an object"])
    return {name: entry for name, entry in body.items() if name != "__metadata__"}


def _header(name: str, entry: Any, first_byte: int) -> TensorHeader:
    try:
        kind, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, first, last)
        whole = all(type(number) is int and 0 <= number <= _LARGEST_NUMBER for number in numbers)
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or len(shape) > _MOST_AXES or not isinstance(kind, str) or last < first:
        raise Unreadable([f"{name} has a header that cannot be read"])
    return TensorHeader(kind, tuple(shape), first_byte + first, last - first)


def _gaps(headers: Mapping[str, TensorHeader], first_byte: int, file_bytes: int) -> list[str]:
    """Return whether the tensors overlap, leave gaps or do not end where the file ends."""
    expected = first_byte
    for header in sorted(headers.values(), key=lambda header: (header.first, header.n_bytes)):
        if header.first != expected:
            return ["its tensors overlap or leave gaps"]
        expected += header.n_bytes
    return [] if expected == file_bytes else [f"its tensors end at byte {expected:,}, and the file at {file_bytes:,}"]
