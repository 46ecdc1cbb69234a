"""The nine architectures in shapes that `CASES` leave out: tied and untied, with and without biases, other heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_support import CASES, GROUPED, LAYER_TYPES, SIZES, WINDOW, Case, captured, token_batch
from test_models_families import reference_of

from actstore.models import load_model, prove

ALONE = SIZES | {"num_key_value_heads": 6, "head_dim": 10}  # as many key heads as query heads
ONE_KEY_HEAD = SIZES | {"num_key_value_heads": 1, "head_dim": 10}


def _changed(name: str, **sizes: Any) -> Case:
    """Return an architecture of `CASES` in another shape."""
    case = CASES[name]
    return Case(case.architecture, case.layout, lambda: type(case.config())(**sizes))


SHAPES = {
    "gemma_2_untied_with_biases": _changed(
        "gemma_2", **ALONE, **WINDOW, query_pre_attn_scalar=3, attention_bias=True, tie_word_embeddings=False
    ),
    "gemma_3_untied_with_biases": _changed(
        "gemma_3_text", **ONE_KEY_HEAD, **WINDOW, **LAYER_TYPES, attention_bias=True, tie_word_embeddings=False
    ),
    "llama_with_biases_of_the_mlp": _changed("llama", **ONE_KEY_HEAD, mlp_bias=True),
    "mistral_tied_without_window": _changed("mistral", **ALONE, sliding_window=None, tie_word_embeddings=True),
    "qwen_2_with_wide_heads": _changed("qwen_2", **GROUPED),
    "qwen_3_tied": _changed("qwen_3", **ONE_KEY_HEAD, tie_word_embeddings=True),
    "olmo_2_tied_with_biases": _changed(
        "olmo_2", **SIZES, num_key_value_heads=1, attention_bias=True, tie_word_embeddings=True
    ),
    "gpt_2_scaled_by_layer": _changed(
        "gpt_2",
        **{"vocab_size": 97, "n_embd": 24, "n_layer": 3, "n_head": 2, "n_inner": 50},
        scale_attn_by_inverse_layer_idx=True,
        tie_word_embeddings=False,
    ),
    "pythia_tied_without_biases": _changed(
        "pythia", **SIZES, attention_bias=False, rotary_pct=1.0, tie_word_embeddings=True
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_site_of_another_shape_is_what_transformers_computes(name: str) -> None:
    case, batch = SHAPES[name], token_batch((11, 6, 1))
    model = load_model(case.model())
    reference = reference_of(model.causal_lm, case.layout, *batch)
    sites = [site for site in model.sites() if site.kind != "pattern"]
    for site, values in captured(model, *batch, *sites).items():
        assert values.shape[-1] == model.site_width(site)
        if site.kind == "ln2_normalized":
            torch.testing.assert_close(values.double(), reference[str(site)].double(), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(values, reference[str(site)]), site
    assert all(check.ok for check in prove(model, model.sites()))
