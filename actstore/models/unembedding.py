"""From a residual stream to logits: the final norm, the unembedding and the soft cap, as plain values.

What lenses need of a model; the kit of a store holds the same numbers, so they work without the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actstore.errors import InvalidInput, explain
from actstore.tensors import as_tensor

from .families import Norm
from .transforms import NORMALIZED

if TYPE_CHECKING:
    import torch

__all__ = ["Unembedding", "logits", "unembedding_of"]

# Vocabulary rows that are widened to float32 at once, where the device cannot multiply into float32.
_WIDENED_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Unembedding:
    """Final norm, unembedding and soft cap.

    gain float32 (d_model): the effective one, 1 + weight for Gemma; weight (vocabulary, d_model) in the model's dtype;
    bias float32 (d_model): added after the gain, by layer norms only. Raises InvalidInput where shapes disagree.
    """

    gain: torch.Tensor
    weight: torch.Tensor
    softcap: float | None
    norm_eps: float
    norm: Norm = "rms"
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        per_column = {tuple(vector.shape) for vector in (self.gain, self.bias) if vector is not None}
        if self.weight.ndim != 2 or per_column != {(self.weight.shape[1],)}:
            raise InvalidInput(
                explain(f"gain and bias {sorted(per_column)} and weight {tuple(self.weight.shape)} disagree")
            )


def unembedding_of(piece: Any, device: str | torch.device) -> Unembedding:
    """Return a kit's piece `unembedding`, its arrays and attributes, as tensors on a device."""
    vectors = {name: as_tensor(piece[name][:]).to(device) for name in ("weight", "gain", "bias") if name in piece}
    return Unembedding(
        gain=vectors["gain"],
        weight=vectors["weight"],
        softcap=piece.attrs["softcap"],
        norm_eps=float(piece.attrs["norm_epsilon"]),
        norm="layer" if piece.attrs["norm"] == "layer" else "rms",
        bias=vectors.get("bias"),
    )


def logits(unembedding: Unembedding, resid_rows: torch.Tensor) -> torch.Tensor:
    """Return the logits of residual-stream rows: (row, d_model) of any float dtype → float32 (row, vocabulary).

    logits = cap · tanh(U · norm(x) / cap). Norm and cap are computed in float32; the normalised rows are rounded to
    the weight's dtype, as the model does, and multiplied with a float32 result.
    """
    import torch

    with torch.no_grad():
        normed = NORMALIZED[unembedding.norm](resid_rows.float(), unembedding.norm_eps) * unembedding.gain
        if unembedding.bias is not None:
            normed += unembedding.bias
        raw = _product(normed.to(unembedding.weight.dtype), unembedding.weight)
        cap = unembedding.softcap
        return raw if cap is None else raw.div_(cap).tanh_().mul_(cap)


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    import torch

    if weight.dtype == torch.float32:
        return rows @ weight.T
    if weight.is_cuda:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    wide = rows.float()
    return torch.cat([wide @ part.float().T for part in torch.split(weight, _WIDENED_ROWS)], dim=1)
