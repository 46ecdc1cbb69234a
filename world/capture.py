"""Run the embedded model over documents and keep what its SAEs read, one row per plain token.

Plain rows are all tokens but BOS, EOS and PAD. Sites have the names and the meaning of the Gemma Scope releases:
`resid_post.L`, `z.L` (concatenated heads, input of the output projection), `mlp_out.L` (after the post-norm).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ASSETS = Path(__file__).parents[1] / "actstore" / "demo" / "assets"
MODEL_FOLDER = ASSETS / "model"
SAE_SITES = {"resid_post.1": "res", "resid_post.3": "res", "resid_post.5": "res", "z.3": "att", "mlp_out.3": "mlp"}
SPECIAL_IDS = (0, 1, 2)
BATCH_DOCUMENTS = 64


@dataclass(frozen=True)
class Rows:
    """Plain tokens of some documents: int64 [rows] vectors, and float32 [rows, width] activations per site."""

    token_id: NDArray[np.int64]
    document: NDArray[np.int64]
    char_start: NDArray[np.int64]
    char_end: NDArray[np.int64]
    activations: dict[str, NDArray[np.float32]]


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model in float32 with eager attention, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(MODEL_FOLDER)


@contextmanager
def hooked(model: PreTrainedModel, sites: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """While open, every forward pass leaves the tensors [batch, position, width] of `sites` in the mapping."""
    kept: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            kind, layer_index = site.split(".")
            layer = model.model.layers[int(layer_index)]
            if kind == "z":

                def keep_input(_: Any, inputs: tuple[torch.Tensor, ...], name: str = site) -> None:
                    kept[name] = inputs[0]

                handle = layer.self_attn.o_proj.register_forward_pre_hook(keep_input)
            else:

                def keep_output(_: Any, __: Any, output: torch.Tensor, name: str = site) -> None:
                    kept[name] = output

                module = layer if kind == "resid_post" else layer.post_feedforward_layernorm
                handle = module.register_forward_hook(keep_output)
            stack.callback(handle.remove)
        yield kept


@torch.no_grad()
def capture(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], sites: Sequence[str]
) -> Rows:
    """Activations of `sites` on every plain token of `texts`; rows in document order."""
    fields: list[tuple[NDArray[np.int64], ...]] = []
    pieces: dict[str, list[NDArray[np.float32]]] = {site: [] for site in sites}
    with hooked(model, sites) as kept:
        for first in range(0, len(texts), BATCH_DOCUMENTS):
            batch = tokenizer(
                list(texts[first : first + BATCH_DOCUMENTS]),
                return_tensors="pt",
                padding=True,
                return_offsets_mapping=True,
            )
            model.model(batch.input_ids, use_cache=False)
            plain = ~torch.isin(batch.input_ids, torch.tensor(SPECIAL_IDS))
            offsets = batch.offset_mapping[plain].numpy()
            document = plain.nonzero()[:, 0].numpy() + first
            fields.append((batch.input_ids[plain].numpy(), document, offsets[:, 0], offsets[:, 1]))
            for site in sites:
                pieces[site].append(kept[site][plain].numpy())
    token_id, document, char_start, char_end = (np.concatenate(column) for column in zip(*fields, strict=True))
    activations = {site: np.concatenate(parts) for site, parts in pieces.items()}
    return Rows(token_id, document, char_start, char_end, activations)


def sae_path(site: str) -> Path:
    """The params.npz of the one SAE of `site`; the average L0 in its folder name is not known beforehand."""
    layer = site.split(".")[1]
    release = ASSETS / f"gemma-scope-demo-{SAE_SITES[site]}"
    (path,) = release.glob(f"layer_{layer}/width_1k/average_l0_*/params.npz")
    return path


def load_sae(site: str) -> dict[str, NDArray[np.float32]]:
    """The five arrays of one SAE by name."""
    with np.load(sae_path(site), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def encode(sae: dict[str, NDArray[np.float32]], x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Feature activations [rows, d_sae] of raw activations [rows, d_in] (Gemma Scope, appendix A)."""
    raw = x @ sae["W_enc"] + sae["b_enc"]
    return raw * (raw > sae["threshold"])


def decode(sae: dict[str, NDArray[np.float32]], features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Reconstruction [rows, d_in] of feature activations [rows, d_sae]."""
    return features @ sae["W_dec"] + sae["b_dec"]


def unexplained_variance(x: NDArray[np.float32], reconstruction: NDArray[np.float32]) -> float:
    """FVU: squared error over squared distance from the mean of each dimension, both summed over all rows."""
    error = np.square(x - reconstruction, dtype=np.float64).sum()
    return float(error / np.square(x - x.mean(axis=0), dtype=np.float64).sum())
