"""Read tensors from what `torch.save` wrote, where the user allowed it: tensors only, never another object.

A pickle is a program. `weights_only` runs it in a machine that knows tensors and nothing else; sizes are taken from a
first run on the meta device, which holds no numbers, and held against the file.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .faults import Unreadable

if TYPE_CHECKING:
    import torch

__all__ = ["PickledHeader", "read_pickled", "read_pickled_headers", "read_pickled_values"]


@dataclass(frozen=True)
class PickledHeader:
    """What a tensor says of itself, and its key in the file."""

    key: str
    shape: tuple[int, ...]


def read_pickled_headers(
    file: io.BufferedReader, file_bytes: int, values: Collection[str] = ()
) -> dict[str, PickledHeader]:
    """Return the shape of every tensor by its key; raises Unreadable for anything but a flat dict of real tensors.

    values: keys that may stand for something else, and are left out.
    """
    _refuse_bombs(file, file_bytes)
    headers, faults = {}, []
    for key, value in _loaded(file, "meta").items():
        if key in values:
            continue
        shape = tuple(getattr(value, "shape", ()))
        if not _is_tensor(value):
            faults.append(f"{key} is no tensor of real numbers")
        elif math.prod(shape) * value.element_size() > file_bytes:
            faults.append(f"{key} claims more than the file holds by its shape {shape}")
        headers[str(key)] = PickledHeader(str(key), shape)
    if faults:
        raise Unreadable(faults)
    return headers


def read_pickled(file: io.BufferedReader, headers: Mapping[str, PickledHeader]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the tensors as float32."""
    state = _loaded(file, "cpu")
    return {name: state[header.key].detach().float().contiguous().numpy() for name, header in headers.items()}


def read_pickled_values(file: io.BufferedReader, file_bytes: int, values: Collection[str]) -> dict[str, Any]:
    """Return what stands under some keys where they are there; no tensor is read. Raises as `read_pickled_headers`."""
    _refuse_bombs(file, file_bytes)
    return {key: value for key, value in _loaded(file, "meta").items() if key in values}


def _loaded(file: io.BufferedReader, device: str) -> Mapping[str, torch.Tensor]:
    import torch

    file.seek(0)
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # a damaged program can fail in any way
        first = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise Unreadable([f"it holds more than tensors, or is damaged ({first})"]) from error
    if not isinstance(state, dict):
        raise Unreadable(["it is not a dict of tensors"])
    return state


def _is_tensor(value: Any) -> bool:
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    return not value.is_complex() and value.dtype != torch.bool


def _refuse_bombs(file: io.BufferedReader, file_bytes: int) -> None:
    """`torch.save` packs nothing: what unpacks to more than the file was made to exhaust memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise Unreadable(["it is not what torch.save writes, or is cut short"]) from error
    if unpacked > file_bytes:
        raise Unreadable([f"{file_bytes:,} bytes would unpack to {unpacked:,}"])
