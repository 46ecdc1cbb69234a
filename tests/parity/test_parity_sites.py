"""Every TransformerLens hook that has a site is, in TransformerLens itself, the tensor of that site."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import models_support
import pytest
import torch
import transformers
from models_support import CASES, VOCABULARY, Case, captured, token_batch
from tokenizers import Tokenizer, models

from actstore.errors import ActstoreError
from actstore.models import load_model
from actstore.sites import Site, parse_site

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of its own imports
    transformer_lens: Any = pytest.importorskip("transformer_lens")
    bridge: Any = pytest.importorskip("transformer_lens.model_bridge")

torch.set_num_threads(1)

WITHOUT_A_BRIDGE = {"gemma_3_with_images", "neox_in_sequence_without_biases"}
FAMILIES = [name for name in CASES if name not in WITHOUT_A_BRIDGE]
EVERYWHERE = {"resid_pre", "resid_post", "z", "v", "pattern", "attn_out", "mlp_out", "mlp_act", "final"}

# How a HookedTransformer is told the same architecture: sizes, then what its own tables say of the family.
SIZES = {"n_layers": 3, "d_model": 24, "n_ctx": 64, "n_heads": 6, "d_mlp": 36, "d_vocab": VOCABULARY}
ROTARY = {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": False, "rotary_base": 10_000}
GATED = (
    SIZES
    | ROTARY
    | {
        "d_head": 10,
        "rotary_dim": 10,
        "n_key_value_heads": 3,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "eps": 1e-6,
    }
)
GEMMA_2 = GATED | {
    "act_fn": "gelu_pytorch_tanh",
    "use_local_attn": True,
    "attn_types": ["local", "global", "local"],
    "window_size": 4,
    "attn_scale": 10**0.5,
    "attn_scores_soft_cap": 50.0,
    "output_logits_soft_cap": 30.0,
    "use_normalization_before_and_after": True,
}
GPT_2 = SIZES | {"d_head": 4, "act_fn": "gelu_new", "normalization_type": "LN", "eps": 1e-5}
NEOX = (
    SIZES
    | ROTARY
    | {
        "d_head": 4,
        "rotary_dim": 2,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "eps": 1e-5,
    }
)
PYTHIA = replace(CASES["pythia"], config=lambda: transformers.GPTNeoXConfig(**models_support.SIZES, rotary_pct=0.5))
LEGACY = {
    "gemma": (CASES["gemma_2"], GEMMA_2),
    "llama": (CASES["llama"], GATED | {"act_fn": "silu"}),
    "gpt2": (CASES["gpt_2"], GPT_2),
    "neox": (PYTHIA, NEOX),
}


def _parsed(name: str) -> Site | None:
    try:
        return parse_site(name)
    except ActstoreError:
        return None


def _tokenizer(folder: Path) -> Any:
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{index}" for index in range(VOCABULARY - len(special)))]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def _expect(
    case: Case, token_ids: torch.Tensor, cache: Mapping[str, torch.Tensor], *, rounding: float
) -> dict[str, Site]:
    """Hold every hook that has a site against that site of a fresh model; return what was held."""
    model = load_model(case.model())
    existing = set(model.sites())
    named = {hook: site for hook in cache if (site := _parsed(hook)) in existing}
    sites = captured(model, token_ids, torch.ones_like(token_ids), *set(named.values()))
    for hook, site in named.items():
        found = cache[hook].reshape(sites[site].shape)  # heads apart, or not
        error = float((found - sites[site]).abs().max() / sites[site].abs().max())
        assert error <= rounding, f"{hook} is not {site}: {error}"
    return named


def _kinds(named: Mapping[str, Site]) -> set[str]:
    return {site.kind for site in named.values()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_of_the_bridge(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    causal_lm = CASES[name].model()
    causal_lm.save_pretrained(tmp_path)
    booted = bridge.TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=causal_lm, tokenizer=_tokenizer(tmp_path), device="cpu", dtype=torch.float32
    )
    token_ids, _ = token_batch((7, 7))
    with torch.no_grad():
        _, cache = booted.run_with_cache(token_ids)
    assert _kinds(_expect(CASES[name], token_ids, cache, rounding=1e-5)) >= EVERYWHERE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEGACY)
def test_hooks_of_a_hooked_transformer_without_processing(name: str) -> None:
    case, config = LEGACY[name]
    causal_lm = case.model()
    lens = transformer_lens.HookedTransformer(transformer_lens.HookedTransformerConfig(**config))
    convert = getattr(transformer_lens.pretrained.weight_conversions, f"convert_{name}_weights")
    lens.load_state_dict(convert(causal_lm, lens.cfg), strict=False)
    lens.set_use_hook_mlp_in(not lens.cfg.parallel_attn_mlp)
    token_ids, _ = token_batch((7, 7))
    with torch.no_grad():
        logits, cache = lens.run_with_cache(token_ids)
        expected = causal_lm(input_ids=token_ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)  # the conversion itself
    named = _expect(case, token_ids, cache, rounding=1e-4)
    assert _kinds(named) >= EVERYWHERE - {"final"} | ({"ln2_normalized"} if name == "gemma" else set())
    assert ("blocks.1.hook_mlp_in" in named) is (name != "neox")
