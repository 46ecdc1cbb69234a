"""Read arrays from an `.npz` that nobody vouches for.

Everything is decided from the archive's directory and each array's header, before memory for an array is asked for:
names, types, shapes, and that a header's size is the entry's size. Nothing in the file is ever unpickled.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .faults import Unreadable

__all__ = ["ArrayHeader", "read_arrays", "read_headers"]

_DTYPES = {np.dtype("<f4"): "float32", np.dtype("<f2"): "float16"}
# Weights are nearly incompressible; an archive that unpacks to more than this is made to exhaust memory.
_LARGEST_RATIO = 100
_SMALL_BYTES = 1 << 26
_MOST_AXES, _LARGEST_LENGTH = 8, 1 << 40
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, RuntimeError, NotImplementedError)
# What numpy's reading of a header as a Python literal raises beside ValueError; none is of our own memory or stack.
_UNREADABLE_HEADER = (
    *(SyntaxError, tokenize.TokenError, TypeError, LookupError, AttributeError),
    *(MemoryError, RecursionError, OverflowError),
)


@dataclass(frozen=True)
class ArrayHeader:
    """What an array says of itself, and the entry of the archive that it is in."""

    entry: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header_bytes: int

    def faults(self, name: str) -> list[str]:
        """Return what is wrong with the type and the size, without reading the array."""
        if self.dtype.hasobject:
            return [f"{name} holds Python objects (a pickle), which are never opened"]
        if self.dtype not in _DTYPES:
            return [f"{name} is {self.dtype}, where {' or '.join(_DTYPES.values())} is read"]
        claimed = math.prod(self.shape) * self.dtype.itemsize
        held = self.entry.file_size - self.header_bytes
        return (
            [] if claimed == held else [f"{name} claims {claimed:,} bytes by its shape {self.shape} and has {held:,}"]
        )


def read_headers(archive: zipfile.ZipFile, archive_bytes: int) -> dict[str, ArrayHeader]:
    """Return the header of every array by its name; raises Unreadable for what is not an npz of arrays.

    archive_bytes: the size of the file, which its directory may not contradict.
    """
    headers: dict[str, ArrayHeader] = {}
    faults: list[str] = []
    for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy")
        if name in headers:
            faults.append(f"{name} is there twice")
        try:
            headers[name] = _read_header(archive, entry)
        except _DAMAGE as error:
            faults.append(f"{entry.filename} cannot be read as an array ({_short(error)})")
    for name, header in headers.items():
        faults += header.faults(name)
    if faults or (faults := _bomb(archive.infolist(), archive_bytes)):
        raise Unreadable(faults)
    return headers


def read_arrays(archive: zipfile.ZipFile, headers: Mapping[str, ArrayHeader]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the arrays as float32 (float16 is widened exactly); raises Unreadable where bytes are damaged."""
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    faults: list[str] = []
    for name, header in headers.items():
        try:
            with archive.open(header.entry) as file:
                read = np.lib.format.read_array(file, allow_pickle=False)
                file.read(1)  # the checksum is compared at the end of the entry
            arrays[name] = np.ascontiguousarray(read, dtype=np.float32)
        except _DAMAGE as error:
            faults.append(f"{name} is damaged ({_short(error)})")
    if faults:
        raise Unreadable(faults)
    return arrays


def _read_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> ArrayHeader:
    with archive.open(entry) as file:
        shape, dtype = _parse_header(file)
        return ArrayHeader(entry, shape, dtype, file.tell())


def _parse_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of the format is not read")
    try:
        shape, _, dtype = readers[version](file)
    except _UNREADABLE_HEADER as error:
        raise ValueError(f"its header says nothing: {_short(error)}") from None
    if len(shape) > _MOST_AXES or not all(0 <= length <= _LARGEST_LENGTH for length in shape):
        raise ValueError("a shape that no array has")
    return shape, dtype


def _bomb(entries: Sequence[zipfile.ZipInfo], archive_bytes: int) -> list[str]:
    """Measure against the file itself: the packed sizes are claims of its directory too."""
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked <= max(_SMALL_BYTES, _LARGEST_RATIO * archive_bytes):
        return []
    return [f"{archive_bytes:,} bytes would unpack to {unpacked:,}, which no weights do"]


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]
