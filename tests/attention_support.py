"""Full patterns from transformers alone, and what attention must store of them, by loops over rows and heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from asking_support import Truth
from extraction_support import batches_of
from models_support import CASES
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import actstore
from actstore.store import StoreReader

torch.set_num_threads(1)

CONTEXT, SHARD_ROWS, BATCH_TOKENS = 12, 24, 160
TEXTS = [
    "the cat on a hat the cat on a hat then",
    "a",
    "that boat not that boat a a a",
    "hat cat the on then not boat that a hat cat the on then not boat the cat",
    "cat",
    "the the the the the the the the the the the the",
]
MORE = ["boat a boat a boat", "then not then not then a hat"]
METRICS = ("entropy", "previous_token", "self_attention", "bos_attention", "induction")


def words(*, bos: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, with or without a BOS before each window."""
    known = ["<pad>", "<bos>", "<unk>", *sorted({word for text in TEXTS + MORE for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        special["bos_token"] = "<bos>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def extract(model: Any, out: Path, *, bos: bool = True, texts: list[str] | None = TEXTS, **options: Any) -> Any:
    """Extract attention of a model as these tests like it: several shards, ragged batches."""
    asked = {
        "tokenizer": words(bos=bos),
        "out": out,
        "attention_top": 3,
        "predictions": False,
        "context": CONTEXT,
        "shard_rows": SHARD_ROWS,
        "batch_tokens": BATCH_TOKENS,
        "device": "cpu",
    }
    return actstore.extract(model, texts, **asked | options)


def case_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model whose attention is neither flat nor on one key: queries and keys are made smaller."""
    model = CASES[name].model(dtype)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if any(part in path for part in ("q_proj", "k_proj", "c_attn", "query_key_value")):
                parameter.mul_(0.5)
    return model


def patterns(model: Any, truth: Truth, batch_tokens: int = BATCH_TOKENS) -> dict[int, list[np.ndarray]]:
    """Return by layer the pattern of each sequence, (head, query, key), run in the batches of the layout."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for members in batches_of(truth, batch_tokens):
        lengths = [int(truth.sequences[seq, 2]) for seq in members]
        token_ids = torch.zeros(len(members), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(token_ids)
        for place, (seq, length) in enumerate(zip(members, lengths, strict=True)):
            first = int(truth.places(truth.sequences[seq, 1]))
            token_ids[place, :length] = torch.from_numpy(truth.field("token_id")[first : first + length].astype("i8"))
            mask[place, :length] = 1
        with torch.no_grad():
            output = model(input_ids=token_ids, attention_mask=mask, use_cache=False, output_attentions=True)
        for layer, weights in enumerate(output.attentions):
            for place, (seq, length) in enumerate(zip(members, lengths, strict=True)):
                found.setdefault(layer, {})[seq] = weights[place, :, :length, :length].float().numpy()
    return {layer: [of[seq] for seq in sorted(of)] for layer, of in found.items()}


def sequences(truth: Truth) -> list[tuple[int, list[int], list[int]]]:
    """Return first row, token ids and flags of each sequence."""
    found = []
    for _, row, n_tokens in truth.sequences:
        here = slice(int(truth.places(row)), int(truth.places(row)) + int(n_tokens))
        found.append((int(row), truth.field("token_id")[here].tolist(), truth.field("flags")[here].tolist()))
    return found


def expected_rows(pattern: np.ndarray, token_ids: list[int], flags: list[int], k: int) -> list[list[dict[str, Any]]]:
    """Return what is stored of each row and head of a sequence: edges (key, weight), kept_weight and the metrics."""
    rows = []
    for query in range(len(token_ids)):
        heads = []
        for weights in pattern[:, query]:
            edges = sorted((-float(weight), key) for key, weight in enumerate(weights) if weight > 0)[:k]
            follows = [
                key
                for key in range(1, query)
                if token_ids[key - 1] == token_ids[query] and not flags[query] & 1 and not flags[key - 1] & 1
            ]
            heads.append(
                {
                    "edges": [(key, -negative) for negative, key in edges],
                    "kept_weight": -sum(negative for negative, _ in edges),
                    "entropy": -sum(float(p) * np.log(float(p)) for p in weights if p > 0),
                    "previous_token": float(weights[query - 1]) if query else np.nan,
                    "self_attention": float(weights[query]),
                    "bos_attention": float(weights[0]) if query else np.nan,
                    "induction": sum(float(weights[key]) for key in follows) if follows else np.nan,
                }
            )
        rows.append(heads)
    return rows


def truth_of(path: Path) -> Truth:
    return Truth(StoreReader(path))
