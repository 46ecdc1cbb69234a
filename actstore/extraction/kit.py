"""What an extraction leaves behind so that nobody needs the model again (docs/format.md §8).

The display text of every token, the unembedding, the way of stored heads and neurons into the residual stream, the
weights of SAEs, and each feature's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.models import LoadedModel, ModelFacts, Unembedding
from actstore.models.facts import ITEM_BYTES
from actstore.recipe import Recipe
from actstore.saes import NEURONS, Encoder, SaeEncoder, SparseCoder
from actstore.sites import Site, parse_site
from actstore.store import FileProof, encode_bundle, pack_texts, prove_and_write, write_piece
from actstore.tensors import as_array

from .directions import PROJECTED, Directions, way_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "UNEMBEDDING",
    "feature_logits",
    "kit_bytes",
    "kit_writers",
    "sae_weight_bytes",
    "write_feature_logits",
    "write_output",
    "write_sae_weights",
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
        "weight": (as_array(unembedding.weight), ("token", "width")),
        "gain": (as_array(unembedding.gain), ("width",)),
    }
    if unembedding.bias is not None:
        arrays["bias"] = (as_array(unembedding.bias), ("width",))
    attributes = {
        "piece": UNEMBEDDING,
        "norm": unembedding.norm,
        "norm_epsilon": unembedding.norm_eps,
        "softcap": unembedding.softcap,
    }
    return write_piece(root, arrays, attributes)


def kit_writers(
    model: LoadedModel, recipe: Recipe, encoders: Sequence[Encoder], *, sae_weights: bool
) -> dict[str, Callable[[Path], str]]:
    """Return every piece of a pass's kit: its name, and what writes it below a store's root and returns its digest."""
    writers: dict[str, Callable[[Path], str]] = {UNEMBEDDING: partial(write_unembedding, model=model)}
    for site in _projected(recipe):
        writers[f"output/{site}"] = partial(write_output, model=model, site=site)
    for encoder in encoders:
        if sae_weights and isinstance(encoder, SaeEncoder):
            writers[f"sae/{encoder.identity.sae}"] = partial(write_sae_weights, coder=encoder.coder)
    return writers


def _projected(recipe: Recipe) -> list[Site]:
    """Return the sites of a recipe, stored or encoded, whose numbers reach the stream through weights."""
    names = [*recipe.sites, *(coder.write_site or coder.site for coder in recipe.saes)]
    return [site for site in map(parse_site, dict.fromkeys(names)) if site.kind in PROJECTED]


def write_output(root: Path, model: LoadedModel, site: Site) -> str:
    """Write what lies between a site and the residual stream, such as W_O and the post-norm's gain, as a kit piece."""
    way = way_of(model, site)
    assert way is not None, site
    arrays: dict[str, tuple[npt.NDArray[Any], tuple[str, ...]]] = {}
    if way.weight is not None:
        arrays["weight"] = (as_array(way.weight), ("input", "width"))
    vectors = (("bias", way.bias), ("gain", way.gain))
    arrays |= {name: (as_array(vector), ("width",)) for name, vector in vectors if vector is not None}
    norm = {"norm": model.family.norm, "norm_epsilon": model.facts.norm_eps} if way.gain is not None else {}
    attributes = {"piece": "output", "site": str(site), "n_heads": model.facts.n_heads, **norm}
    return write_piece(root, arrays, attributes)


def write_sae_weights(root: Path, coder: SparseCoder) -> str:
    """Write a coder's weights in float32 as a kit piece, never copied whole; return its digest."""
    arrays: dict[str, tuple[npt.NDArray[Any], tuple[str, ...]]] = {
        "w_enc": (coder.w_enc, ("input", "feature")),
        "w_dec": (coder.w_dec, ("feature", "output")),
        "b_enc": (coder.b_enc, ("feature",)),
        "b_dec": (coder.b_dec, ("output",)),
        "threshold": (coder.threshold, ("feature",)),
    }
    if coder.w_skip is not None:
        arrays["w_skip"] = (coder.w_skip, ("input", "output"))
    attributes = {
        "piece": "sae",
        "architecture": coder.identity.architecture,
        "k": coder.k,
        "subtracts_b_dec": coder.subtracts_b_dec,
        "normalisation": str(coder.normalisation),
    }
    return write_piece(root, arrays, attributes)


def kit_bytes(facts: ModelFacts, recipe: Recipe, site_width: Callable[[Site], int], *, sae_weights: bool) -> int:
    """Return about how many bytes a pass's kit takes."""
    item_bytes = ITEM_BYTES[recipe.compute_dtype]
    total = facts.vocabulary_size * facts.d_model * item_bytes
    inputs = (site_width(site) for site in _projected(recipe) if site.kind in ("z", "mlp_act"))
    total += sum(inputs) * facts.d_model * item_bytes
    return total + (sae_weight_bytes(recipe, site_width) if sae_weights else 0)


def sae_weight_bytes(recipe: Recipe, site_width: Callable[[Site], int]) -> int:
    """Return about how many bytes the weights of a recipe's SAEs take."""
    coders = [coder for coder in recipe.saes if coder.architecture != NEURONS]
    written = [site_width(parse_site(coder.write_site or coder.site)) for coder in coders]
    sizes = [coder.width * (coder.d_in + d_out) for coder, d_out in zip(coders, written, strict=True)]
    return sum(sizes) * ITEM_BYTES["float32"]


def write_feature_logits(
    root: Path, unembedding: Unembedding, directions: Mapping[str, Directions | None]
) -> dict[str, FileProof]:
    """Write the most raised and most lowered tokens of each SAE that has directions; return files with their proofs."""
    proofs = {}
    for sae, found in directions.items():
        if found is None:
            continue
        token_ids, logits = feature_logits(unembedding, found)
        axes = ("feature", "rank")
        data = encode_bundle({"token_ids": (token_ids, axes), "logits": (logits, axes)}, {"n_top": TOP_TOKENS})
        name = f"firings/{sae}/feature_logits.zip"
        proofs[name] = prove_and_write(root, name, data, None)
    return proofs


def feature_logits(
    unembedding: Unembedding, directions: Directions
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return token ids int32 and logits float32 (feature, rank): first the highest, falling, then the lowest, rising.

    Direction · final-norm gain · unembeddingᵀ, before the soft cap, minus the vocabulary's mean: a constant shift says
    nothing.
    """
    import torch

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
