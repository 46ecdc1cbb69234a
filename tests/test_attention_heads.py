"""Heads that are known: planted ones have the scores that their names promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from attention_support import extract, words
from transformers import GPT2Config, GPT2LMHeadModel

import actstore

N_POSITIONS, D_HEAD = 16, 32


def planted() -> Any:
    """Return a GPT-2 of one layer and three heads of which all are set by hand, through its learned positions.

    Head 0 attends to the previous token, head 1 to the token itself, head 2 to the first token of the sequence: queries
    of position p agree with the key of position p − 1, p and 0. Embeddings of tokens do not reach queries and keys.
    """
    torch.manual_seed(0)
    width = 3 * D_HEAD
    config = GPT2Config(
        vocab_size=len(words(bos=True)), n_positions=N_POSITIONS, n_embd=width, n_layer=1, n_head=3, n_inner=8
    )
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        transformer = model.transformer
        transformer.wte.weight.mul_(1e-3)
        transformer.wpe.weight.zero_()
        transformer.wpe.weight[:, :N_POSITIONS] = torch.eye(N_POSITIONS)
        attention = transformer.h[0].attn.c_attn  # weight (in, out): queries, keys, values
        attention.weight.zero_()
        attention.bias.zero_()
        for position in range(N_POSITIONS):
            for head, target in enumerate((max(position - 1, 0), position, 0)):
                attention.weight[position, head * D_HEAD + target] = 20.0
                attention.weight[position, width + head * D_HEAD + position] = 20.0
    return model


def test_planted_heads_have_the_scores_of_their_names(tmp_path: Path) -> None:
    extract(planted(), tmp_path / "a.act", attention_top=2)
    with actstore.open(tmp_path / "a.act") as store:
        previous, itself, first = store.sql("FROM heads ORDER BY head").rows()
        assert previous["previous_token"] >= 0.99 and previous["self_attention"] < 0.01
        assert itself["self_attention"] >= 0.99 and itself["previous_token"] < 0.01
        assert first["bos_attention"] >= 0.99 and first["self_attention"] < 0.01
        for head in (previous, itself, first):
            assert head["entropy"] < 0.05
        edges = store.sql("SELECT row - key_row AS back, weight FROM attention WHERE head = 0 AND weight > 0.5").rows()
        on_first_rows = store.sql("SELECT count(*) FROM tokens WHERE pos = 0").scalar()
        assert sorted(edge["back"] for edge in edges)[on_first_rows:] == [1] * (len(edges) - on_first_rows)


def test_a_planted_induction_head_scores(tmp_path: Path) -> None:
    """A head that attends back by the period of the text attends to what followed the token before."""
    model, period = planted(), 3
    with torch.no_grad():
        attention = model.transformer.h[0].attn.c_attn
        for position in range(N_POSITIONS):
            attention.weight[position, :D_HEAD] = 0
            attention.weight[position, max(position - period + 1, 0)] = 20.0
    extract(model, tmp_path / "a.act", texts=["the cat on the cat on the cat on the"], attention_top=2)
    with actstore.open(tmp_path / "a.act") as store:
        head = store.sql("FROM heads WHERE head = 0").rows()[0]
        assert head["induction"] >= 0.99 and head["previous_token"] < 0.5
        assert store.sql("SELECT max(induction) FROM heads WHERE head = 1").scalar() < 0.01
