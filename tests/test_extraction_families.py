"""Every family through a whole extraction: what is stored and asked offline is what transformers says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models_support import CASES, N_LAYERS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import actstore
from actstore.blocks import TOKEN_FIELDS
from actstore.errors import InvalidInput

TEXTS = ["the cat on a hat", "then not that boat", "a"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words: the random models have a vocabulary of 97."""
    words = ["<pad>", "<bos>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_windows_longer_than_learned_positions_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    model = CASES["gpt_2"].model()
    limit = model.config.n_positions
    with pytest.raises(InvalidInput, match=rf"longer than the {limit} positions.*--context {limit} or less"):
        options = {"tokenizer": word_tokenizer(), "out": tmp_path / "a.act", "sites": ["resid_post.0"]}
        actstore.extract(model, TEXTS, context=limit + 1, shard_rows=4096, **options)
    assert not (tmp_path / "a.act").exists()


@pytest.mark.parametrize("name", CASES)
def test_a_family_is_extracted_and_read_without_the_model(tmp_path: Path, name: str) -> None:
    model, tokenizer = CASES[name].model(), word_tokenizer()
    sites = ["resid_post.*", "attn_out.1", "z.1", "final"]
    actstore.extract(
        model, TEXTS, tokenizer=tokenizer, out=tmp_path / "a.act", sites=sites, lens_k=3, context=8, shard_rows=64
    )
    with actstore.open(tmp_path / "a.act") as store:
        assert store.sql("SELECT count(*) FROM health WHERE ok IS NOT TRUE").scalar() == 0
        tokens = store.reader.tokens(0)
        rows = np.flatnonzero(tokens[:, TOKEN_FIELDS.index("seq")] == 0)
        ids = torch.from_numpy(tokens[rows, TOKEN_FIELDS.index("token_id")].astype(np.int64))[None]
        with torch.no_grad():
            output = model(ids, use_cache=False, output_hidden_states=True)
        logprobs = torch.log_softmax(output.logits[0].float(), -1)
        np.testing.assert_allclose(store["final"][rows], output.hidden_states[-1][0].float().numpy(), atol=2e-5)
        last = f"resid_post.{N_LAYERS - 1}"
        offline = store.sql(f"SELECT row, unnest(logit_lens('{last}', row, 3), recursive := true) FROM tokens").rows()
        stored = store.sql(f"SELECT row, rank, logprob FROM lens_tokens WHERE site = '{last}' ORDER BY ALL").rows()
        best = [row["logprob"] for row in offline if row["row"] in rows]
        expected = logprobs.topk(3).values.flatten().numpy()
        np.testing.assert_allclose(best, expected, atol=5e-4)
        np.testing.assert_allclose([row["logprob"] for row in stored if row["row"] in rows], expected, atol=5e-4)
