"""Stores of tiny models of every family with all that an attribution needs, and the model beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from models_support import CASES, N_LAYERS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import actstore
from actstore.api import Store
from actstore.blocks import TOKEN_FIELDS

TEXTS = ["the cat on a hat", "then not that boat", "a", "on the boat a cat not a hat"]
STREAM = ("resid_pre.0", "attn_out.*", "mlp_out.*", "z.*", f"resid_post.{N_LAYERS - 1}")

Weights = dict[str, np.ndarray]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words: the random models have a vocabulary of 97."""
    words = ["<pad>", "<bos>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def extract_family(
    name: str, out: Path, sites: tuple[str, ...] = STREAM, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """Extract a family's tiny model over a few texts, and return the model."""
    model = CASES[name].model(dtype)
    given = {"context": 12, "shard_rows": 64, "allow_unhealthy": True, "device": "cpu"} | options
    actstore.extract(model, TEXTS, tokenizer=word_tokenizer(), out=out, sites=list(sites), **given)
    return model


def weights_of(model: Any) -> Weights:
    """Return every weight of a model, float64."""
    return {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}


def rows_of(store: Store) -> np.ndarray:
    """Return the rows in use of a store of one shard."""
    return np.arange(len(store.reader.tokens(0)))


def logits_of(model: Any, store: Store, *, cap: bool = True) -> np.ndarray:
    """Return transformers' own logits of every row, float64 (row, token), before the soft cap if asked to."""
    capped = model.config.get_text_config()
    kept, tokens = getattr(capped, "final_logit_softcapping", None), store.reader.tokens(0)
    if not cap and kept is not None:
        capped.final_logit_softcapping = None
    seq, ids = tokens[:, TOKEN_FIELDS.index("seq")], tokens[:, TOKEN_FIELDS.index("token_id")]
    with torch.no_grad():
        parts = [model(torch.tensor(ids[seq == one])[None].long(), use_cache=False).logits[0] for one in np.unique(seq)]
    if kept is not None:
        capped.final_logit_softcapping = kept
    return torch.cat(parts).double().numpy()
