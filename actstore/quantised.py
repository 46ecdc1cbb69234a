"""Rows as int8 with a scale for every few neighbouring channels (docs/format.md §5).

A channel with a massive activation costs its own group its precision, and no other channel: so groups are small. That
is cheap, because scales have two bits of mantissa: few values, which compress to less than a byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["GROUP", "dequantise", "n_groups", "quantise"]

GROUP = 16  # channels
LARGEST = 127
DROPPED_BITS = 21  # of a scale's 23 bits of mantissa
HOST_BYTES, DEVICE_BYTES = 1 << 20, 256 << 20  # of float32 values at a time: as a cache holds, as a device likes


def n_groups(width: int) -> int:
    """Return how many scales a row of so many channels has; the last group may be a smaller one."""
    return -(-width // GROUP)


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 (row, width) and scales float32 (row, group) on the values' device: value ≈ int8 · scale.

    A group with a value that is not finite has the scale NaN, and 0 in its place.
    """
    import torch

    n_rows, width = values.shape
    rounded = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    scales = torch.empty((n_rows, n_groups(width)), dtype=torch.float32, device=values.device)
    step = max(1, (HOST_BYTES if values.device.type == "cpu" else DEVICE_BYTES) // (4 * width))
    for first in range(0, n_rows, step):
        here = slice(first, first + step)
        padded = torch.nn.functional.pad(values[here].float(), (0, -width % GROUP))
        groups = padded.reshape(len(padded), -1, GROUP)
        scales[here] = _scales_of(groups)
        steps = (groups / scales[here, :, None]).round_().nan_to_num_(0.0)  # 0 / 0 and NaN are 0
        rounded[here] = steps.flatten(1)[:, :width]
    return rounded, scales


def _scales_of(groups: torch.Tensor) -> torch.Tensor:
    """Return the least scale of two mantissa bits by which every value of a group fits; NaN where none is."""
    import torch

    # Magnitudes are ordered as their bits are, NaN last, and the largest integer is found five times sooner.
    largest = groups.abs().view(torch.int32).amax(dim=2).view(torch.float32)
    bits = (largest / LARGEST).view(torch.int32)
    scales = (((bits + (1 << DROPPED_BITS) - 1) >> DROPPED_BITS) << DROPPED_BITS).view(torch.float32)
    return torch.where(torch.isfinite(largest + scales), scales, torch.nan)


def dequantise(values: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return what int8 (row, width) and its scales (row, group) stand for, exactly: float32 (row, width)."""
    n_rows, width = values.shape
    out = np.empty(values.shape, dtype=np.float32)
    step = max(1, HOST_BYTES // (4 * width))
    for first in range(0, n_rows, step):
        here = slice(first, first + step)
        np.multiply(np.repeat(scales[here], GROUP, axis=1)[:, :width], values[here], out=out[here])
    return out
