"""From the device to the host, beside the device's work: a copy is begun here and waited for by whoever writes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from actstore.tensors import as_array

if TYPE_CHECKING:
    import torch

__all__ = ["Coming", "fetch"]

Coming = Callable[[], npt.NDArray[Any]]
"""Waits until a tensor has come to the host and returns it as an array; may be called in another thread."""


def fetch(tensor: torch.Tensor) -> Coming:
    """Begin to bring a tensor to the host; nobody may write it afterwards.

    From CUDA it is copied into pinned memory on a stream of its own, so that kernels go on. Both allocators take the
    memory back when its last user is done, however late: nothing here is kept for the next call.
    """
    if tensor.device.type != "cuda":
        array = as_array(tensor)
        return lambda: array
    import torch

    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor.detach(), non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(stream)
    tensor.record_stream(stream)

    def wait() -> npt.NDArray[Any]:
        copied.synchronize()
        return as_array(host)

    return wait


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
