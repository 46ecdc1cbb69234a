"""A forward pass over a stored layout, written with loops and raw hooks: what extraction must equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from asking_support import Truth

HOOKED = ("resid_mid", "attn_out", "mlp_out", "z", "resid_post")


def batches_of(truth: Truth, batch_tokens: int) -> list[list[int]]:
    """Return the sequences of every batch: of one shard, longest first, as many as fit when padded to the longest.

    From an eighth of that on, none that is shorter than nine tenths of the longest.
    """
    shard_rows = truth.reader.shard_rows
    by_shard: dict[int, list[int]] = {}
    for seq, (_, row, _) in enumerate(truth.sequences):
        by_shard.setdefault(int(row) // shard_rows, []).append(seq)
    batches: list[list[int]] = []
    for members in by_shard.values():
        waiting = sorted(members, key=lambda seq: -int(truth.sequences[seq, 2]))
        while waiting:
            lengths = [int(truth.sequences[seq, 2]) for seq in waiting]
            size = 1
            while size < len(lengths) and (size + 1) * lengths[0] <= batch_tokens:
                if 8 * size * lengths[0] >= batch_tokens and 10 * lengths[size] < 9 * lengths[0]:
                    break
                size += 1
            batches.append(waiting[:size])
            waiting = waiting[size:]
    return batches


def run_batches(model: Any, truth: Truth, batches: list[list[int]], sites: list[str]) -> dict[str, np.ndarray]:
    """Return each site, and `logits`, of every row in use: (row, width), in the model's dtype widened to float32."""
    found: dict[str, np.ndarray] = {}
    for members in batches:
        lengths = [int(truth.sequences[seq, 2]) for seq in members]
        token_ids = torch.zeros(len(members), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(token_ids)
        firsts = truth.places(truth.sequences[members, 1])
        for place, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
            token_ids[place, :length] = torch.from_numpy(truth.field("token_id")[first : first + length].astype("i8"))
            mask[place, :length] = 1
        for name, values in forward(model, token_ids, mask, sites).items():
            array = found.setdefault(name, np.empty((len(truth.rows), values.shape[-1]), np.float32))
            for place, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
                array[first : first + length] = values[place, :length].float().numpy()
    return found


def forward(model: Any, token_ids: torch.Tensor, mask: torch.Tensor, sites: list[str]) -> dict[str, torch.Tensor]:
    """Return sites from one pass of the whole model: hidden states where transformers has them, else hooks."""
    n_layers = model.config.num_hidden_layers
    found: dict[str, torch.Tensor] = {}
    handles = [_hook(model, site, found) for site in sites if site.partition(".")[0] in HOOKED]
    with torch.no_grad():
        output = model(input_ids=token_ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    for site in sites:
        kind, _, layer = site.partition(".")
        if kind == "resid_pre":
            found[site] = output.hidden_states[int(layer)]
        elif kind == "resid_post" and int(layer) < n_layers - 1:
            found[site] = output.hidden_states[int(layer) + 1]
        elif kind == "final":
            found[site] = output.hidden_states[-1]
    return found | {"logits": output.logits}


def _hook(model: Any, site: str, found: dict[str, torch.Tensor]) -> Any:
    kind, _, layer = site.partition(".")
    block = model.model.layers[int(layer)]
    places = {
        "resid_mid": (block.pre_feedforward_layernorm, "input"),
        "attn_out": (block.post_attention_layernorm, "output"),
        "mlp_out": (block.post_feedforward_layernorm, "output"),
        "z": (block.self_attn.o_proj, "input"),
        "resid_post": (block, "output"),
    }
    module, end = places[kind]

    def keep(_module: Any, inputs: Any, output: Any) -> None:
        values = inputs[0] if end == "input" else output
        found[site] = values[0] if isinstance(values, tuple) else values

    return module.register_forward_hook(keep)


def next_tokens(truth: Truth) -> np.ndarray:
    """Return each row's next token in its sequence, -1 on the last row."""
    token_id, seq = truth.field("token_id"), truth.field("seq")
    return np.array(
        [token_id[i + 1] if i + 1 < len(seq) and seq[i + 1] == seq[i] else -1 for i in range(len(seq))], np.int32
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithm of the softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))
