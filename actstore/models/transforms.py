"""Sites that no module returns: derived from a tensor that one does, by a named transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .facts import ModelFacts

if TYPE_CHECKING:
    import torch

__all__ = ["TRANSFORMS", "rms_normalized"]


def rms_normalized(values: torch.Tensor, eps: float) -> torch.Tensor:
    """Return values / rms(values) over the last axis: float32 inside, the input's dtype outside.

    The RMS norm before its gain: x · (mean(x²) + eps)^(-1/2).
    """
    import torch

    exact = values.float()
    return (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).type_as(values)


TRANSFORMS: dict[str, Callable[[torch.Tensor, ModelFacts], torch.Tensor]] = {
    "rms_normalized": lambda values, facts: rms_normalized(values, facts.norm_eps),
}
