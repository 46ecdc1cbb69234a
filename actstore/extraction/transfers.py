"""Between host and device, beside the device's work: nobody waits who only hands over.

Both of CUDA's allocators take memory back when its last user is done, however late: nothing here is kept for the next
call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from actstore.tensors import as_array, as_tensor

if TYPE_CHECKING:
    import torch

__all__ = ["Coming", "fetch", "send"]

Coming = Callable[[], npt.NDArray[Any]]
"""Waits until a tensor has come to the host and returns it as an array; may be called in another thread."""


def send(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on the device; nobody may write the array afterwards.

    To CUDA it goes from pinned memory: from any other, the host would wait until all that the device has begun is done.
    """
    tensor = as_tensor(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def fetch(tensor: torch.Tensor) -> Coming:
    """Begin to bring a tensor to the host; nobody may write it afterwards.

    From CUDA it is copied into pinned memory on a stream of its own, so that kernels go on.
    """
    if tensor.device.type != "cuda":
        return lambda: as_array(tensor)
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
