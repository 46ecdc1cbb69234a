"""Between numpy and torch, bfloat16 included: of which numpy has no type of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["as_array", "as_tensor"]


def as_tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    """Return an array as a tensor on the host, of its dtype; memory is shared where it is contiguous."""
    import torch

    values = np.ascontiguousarray(values)
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def as_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return a tensor as an array of its dtype; memory is shared where it is on the host and contiguous."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return plain.numpy()
