"""Whatever a tokenizer pads with, and on whichever side, rows are the tokens of the text, each at its own position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_support import CASES, VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import actstore
from actstore.blocks import FLAG_SPECIAL, TOKEN_FIELDS
from actstore.errors import InvalidInput
from actstore.store import StoreReader

TEXTS = ["the cat on a hat", "then not that boat", "a", "the hat on the boat not a cat"]
WORDS = sorted({word for text in TEXTS for word in text.split()})
BOS, UNKNOWN, PAD = "<bos>", "<unk>", "<pad>"


def word_tokenizer(words: list[str] = WORDS, **options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([PAD, BOS, UNKNOWN, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=UNKNOWN, **options)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return first + [tokenizer.get_vocab()[word] for word in text.split()]


def rows_alone(model: Any, ids: list[int]) -> np.ndarray:
    """Return the last hidden states of one text that runs by itself, unpadded."""
    with torch.no_grad():
        states = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states
    return np.asarray(states[-1][0])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"bos_token": BOS, "pad_token": PAD, "padding_side": "right"}, id="padding_right"),
        pytest.param({"bos_token": BOS, "pad_token": PAD, "padding_side": "left"}, id="padding_left"),
        pytest.param({"bos_token": BOS, "truncation_side": "left", "model_max_length": 3}, id="truncating_left"),
        pytest.param({"bos_token": BOS}, id="without_pad"),
        pytest.param({"bos_token": BOS, "pad_token": BOS, "padding_side": "left"}, id="padding_with_bos"),
        pytest.param({"pad_token": PAD}, id="without_bos"),
        pytest.param({}, id="without_either"),
    ],
)
def test_rows_are_those_of_each_text_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    """GPT-2 has learned positions: a text that is shifted by padding has other rows."""
    model, tokenizer = CASES["gpt_2"].model(), word_tokenizer(**options)
    tokenizer(TEXTS, padding="pad_token" in options, truncation="model_max_length" in options)  # leaves its settings
    asked: dict[str, Any] = {"sites": ["final"], "context": 12, "shard_rows": 64, "with_index": False}
    actstore.extract(model, TEXTS, tokenizer=tokenizer, out=tmp_path / "a.act", **asked)
    reader = StoreReader(tmp_path / "a.act")
    assert all(check["ok"] for made in reader.passes.values() for check in made.health)
    tokens = reader.tokens(0)
    token_id, seq, flags = (tokens[:, TOKEN_FIELDS.index(name)] for name in ("token_id", "seq", "flags"))
    found = reader.matrix("sites/final", 0)
    for number, text in enumerate(TEXTS):
        rows = np.flatnonzero(seq == number)
        ids = ids_of(tokenizer, text)
        assert token_id[rows].tolist() == ids
        assert (flags[rows] & FLAG_SPECIAL).tolist() == [int(one == tokenizer.bos_token_id) for one in ids]
        np.testing.assert_allclose(found[rows], rows_alone(model, ids), rtol=1e-4, atol=1e-4)


def test_a_tokenizer_with_more_ids_than_the_model_embeds_is_refused(tmp_path: Path) -> None:
    """The pad token that was added behind the vocabulary is one: its id has no row in the embedding."""
    exact = [*WORDS, *(f"w{number}" for number in range(VOCABULARY - 3 - len(WORDS)))]
    model, fitting = CASES["llama"].model(), word_tokenizer(exact, bos_token=BOS)
    options: dict[str, Any] = {"sites": ["resid_post.0"], "context": 8, "shard_rows": 64, "with_index": False}
    actstore.extract(model, TEXTS, tokenizer=fitting, out=tmp_path / "fits.act", **options)
    fitting.add_special_tokens({"pad_token": "<another pad>"})
    with pytest.raises(InvalidInput, match=r"tokenizer has 98 ids, the model embeds 97.*leave out --tokenizer"):
        actstore.extract(model, TEXTS, tokenizer=fitting, out=tmp_path / "refused.act", **options)
    assert not (tmp_path / "refused.act").exists()
