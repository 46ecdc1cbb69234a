"""Sites that no module returns: derived from a tensor that one does, by a named transformation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .facts import ModelFacts
from .families import Norm, Transform

if TYPE_CHECKING:
    import torch

__all__ = ["NORMALIZED", "TRANSFORMS", "layer_normalized", "rms_normalized"]


def rms_normalized(values: torch.Tensor, eps: float) -> torch.Tensor:
    """Return values / rms(values) over the last axis: float32 inside, the input's dtype outside.

    The RMS norm before its gain: x · (mean(x²) + eps)^(-1/2).
    """
    import torch

    exact = values.float()
    return (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).type_as(values)


def layer_normalized(values: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the layer norm before its gain and bias, (x − mean(x)) · (var(x) + eps)^(-1/2); dtypes as above."""
    exact = values.float()
    return rms_normalized(exact - exact.mean(-1, keepdim=True), eps).type_as(values)


def _third(values: torch.Tensor, part: int) -> torch.Tensor:
    return values.chunk(3, dim=-1)[part]


def _third_of_each_head(values: torch.Tensor, facts: ModelFacts, part: int) -> torch.Tensor:
    heads = values.reshape(*values.shape[:-1], facts.n_heads, 3, facts.d_head)
    return heads[..., part, :].flatten(-2)


NORMALIZED: dict[Norm, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "rms": rms_normalized,
    "layer": layer_normalized,
}

TRANSFORMS: dict[Transform, Callable[[torch.Tensor, ModelFacts], torch.Tensor]] = {
    "rms_normalized": lambda values, facts: rms_normalized(values, facts.norm_eps),
    "layer_normalized": lambda values, facts: layer_normalized(values, facts.norm_eps),
    "heads_joined": lambda values, facts: values.flatten(-2),
    "positions_first_heads_joined": lambda values, facts: values.transpose(-3, -2).flatten(-2),
    "first_third": lambda values, facts: _third(values, 0),
    "second_third": lambda values, facts: _third(values, 1),
    "last_third": lambda values, facts: _third(values, 2),
    "first_third_of_each_head": lambda values, facts: _third_of_each_head(values, facts, 0),
    "second_third_of_each_head": lambda values, facts: _third_of_each_head(values, facts, 1),
    "last_third_of_each_head": lambda values, facts: _third_of_each_head(values, facts, 2),
}
