"""What an extraction leaves behind so that nobody needs the model again: vocabulary, unembedding, feature logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from actstore.models import LoadedModel
from actstore.saes import Encoder
from actstore.store import FileProof, encode_bundle, pack_texts, prove_and_write, write_piece

from .directions import directions_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "UNEMBEDDING",
    "feature_logits",
    "kit_bytes",
    "write_feature_logits",
    "write_unembedding",
    "write_vocabulary",
]

UNEMBEDDING = "unembedding"
TOP_TOKENS = 10  # of a feature, at each end
LOGITS_PER_BLOCK = 1 << 24


def write_vocabulary(root: Path, texts: list[str]) -> str:
    """Write the display text of every token id as a kit piece; return its digest."""
    return write_piece(root, pack_texts(texts), {"piece": "vocabulary"})


def write_unembedding(root: Path, model: LoadedModel) -> str:
    """Write final norm, unembedding and soft cap as a kit piece; return its digest."""
    unembedding = model.unembedding()
    arrays = {
        "weight": (_numpy(unembedding.weight), ("token", "width")),
        "gain": (_numpy(unembedding.gain), ("width",)),
    }
    if unembedding.bias is not None:
        arrays["bias"] = (_numpy(unembedding.bias), ("width",))
    attributes = {
        "piece": UNEMBEDDING,
        "norm": unembedding.norm,
        "norm_epsilon": unembedding.norm_eps,
        "softcap": unembedding.softcap,
    }
    return write_piece(root, arrays, attributes)


def kit_bytes(vocabulary_size: int, d_model: int, item_bytes: int) -> int:
    """Return about how many bytes the unembedding's piece takes."""
    return vocabulary_size * d_model * item_bytes


def write_feature_logits(root: Path, model: LoadedModel, encoders: Sequence[Encoder]) -> dict[str, FileProof]:
    """Write each SAE's most raised and most lowered tokens; return the files with their proofs."""
    proofs = {}
    for encoder in encoders:
        found = feature_logits(model, encoder)
        if found is None:
            continue
        token_ids, logits = found
        axes = ("feature", "rank")
        data = encode_bundle({"token_ids": (token_ids, axes), "logits": (logits, axes)}, {"n_top": TOP_TOKENS})
        name = f"firings/{encoder.identity.sae}/feature_logits.zip"
        proofs[name] = prove_and_write(root, name, data, None)
    return proofs


def feature_logits(
    model: LoadedModel, encoder: Encoder
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None:
    """Return token ids int32 and logits float32 (feature, rank): first the highest, falling, then the lowest, rising.

    Direction · final-norm gain · unembeddingᵀ, before the soft cap, minus the vocabulary's mean: a constant shift says
    nothing. The direction is what `directions_of` says; None where that is nothing.
    """
    import torch

    unembedding = model.unembedding()
    directions = directions_of(model, encoder)
    if directions is None:
        return None
    n_top = min(TOP_TOKENS, unembedding.weight.shape[0] // 2)
    weight = unembedding.weight
    size = max(1, LOGITS_PER_BLOCK // weight.shape[0])
    ids, values = [], []
    for written in directions.blocks(size):
        if unembedding.norm == "layer":  # what is the same in every dimension does not pass a layer norm
            written = written - written.mean(dim=1, keepdim=True)
        logits = _product(written * unembedding.gain, weight)
        logits -= logits.mean(dim=1, keepdim=True)
        high, low = logits.topk(n_top, dim=1), logits.topk(n_top, dim=1, largest=False)
        ids.append(torch.cat([high.indices, low.indices], dim=1).int().cpu())
        values.append(torch.cat([high.values, low.values], dim=1).cpu())
    return torch.cat(ids).numpy(), torch.cat(values).numpy()


def _product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return rows @ weightᵀ in float32 without widening all of `weight` at once."""
    import torch

    if weight.dtype == torch.float32:
        return rows @ weight.T
    return torch.cat([rows @ part.float().T for part in torch.split(weight, 8192)], dim=1)


def _numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    import torch

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        return plain.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return plain.numpy()
