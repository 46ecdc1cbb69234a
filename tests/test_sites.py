"""Names of sites: canonical ones, and those of other libraries, each held against the tensor that it names there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_support import CASES, captured, token_batch

from actstore.errors import ActstoreError, InvalidInput, UnknownName
from actstore.models import load_model
from actstore.sites import KINDS, Site, expand_sites, parse_site


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("resid_post.20", "resid_post.20"),
        ("final", "final"),
        ("blocks.5.hook_resid_pre", "resid_pre.5"),
        ("blocks.5.hook_mlp_in", "resid_mid.5"),
        ("blocks.5.hook_mlp_out", "mlp_out.5"),
        ("blocks.5.attn.hook_z", "z.5"),
        ("blocks.5.ln2.hook_normalized", "ln2_normalized.5"),
        ("blocks.5.hook_in", "resid_pre.5"),
        ("blocks.5.hook_out", "resid_post.5"),
        ("blocks.5.attn.o.hook_in", "z.5"),
        ("blocks.5.mlp.hook_in", "ln2.5"),
        ("blocks.5.mlp.out.hook_in", "mlp_act.5"),
        ("unembed.hook_in", "final"),
        ("model.layers.5.output", "resid_post.5"),
        ("model.layers.5.self_attn.o_proj.input", "z.5"),
        ("model.layers.5.post_feedforward_layernorm.output", "mlp_out.5"),
        ("model.layers.5.pre_feedforward_layernorm.output", "ln2.5"),
        ("model.language_model.layers.5.output", "resid_post.5"),
        ("language_model.model.layers.5.output", "resid_post.5"),
        ("transformer.h.5.attn.c_proj.input", "z.5"),
        ("gpt_neox.layers.5.mlp.output", "mlp_out_raw.5"),
        ("model.norm.output", "final"),
        ("ie:attn_out.5", "attn_out_raw.5"),
        ("ie:attn_out_post.5", "attn_out.5"),
        ("ie:mlp_out.5", "mlp_out_raw.5"),
        ("ie:mlp_in.5", "ln2.5"),
        ("ie:value.5", "v.5"),
        ("ie:final_norm", "final"),
    ],
)
def test_a_name_means_one_site(name: str, canonical: str) -> None:
    assert str(parse_site(name)) == canonical


@pytest.mark.parametrize("kind", KINDS)
def test_a_canonical_name_is_read_back(kind: str) -> None:
    site = Site(kind) if kind in ("embed_raw", "final") else Site(kind, 7)
    assert parse_site(str(site)) == site


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("blocks.3.mlp.hook_out", "'mlp_out_raw.3' or 'mlp_out.3'"),
        ("blocks.3.attn.hook_out", "'attn_out_raw.3' or 'attn_out.3'"),
        ("blocks.3.attn.hook_q", "'q.3'"),
        ("blocks.3.attn.hook_k", "'k.3'"),
        ("model.layers.3.post_attention_layernorm.output", "'ln2.3' or 'attn_out.3'"),
        ("model.layers.3.post_attention_layernorm.input", "'resid_mid.3' or 'attn_out_raw.3'"),
    ],
)
def test_an_ambiguous_name_is_refused_with_both_candidates(name: str, candidates: str) -> None:
    with pytest.raises(InvalidInput, match=candidates):
        parse_site(name)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("blocks.3.hook_nothing", UnknownName, "TransformerLens hook 'hook_nothing'"),
        ("model.layers.3.self_attn.q_proj.output", UnknownName, "Hugging Face module.*q_norm"),
        ("model.layers.3", InvalidInput, "not the name of a site"),
        ("ie:embeddings.0", UnknownName, "interp-engine point 'embeddings'"),
        ("attn_out_post.3", UnknownName, "attn_out"),
        ("resid_post", InvalidInput, "a layer"),
        ("final.3", InvalidInput, "alone"),
        ("resid_post.-1", InvalidInput, "not the name"),
    ],
)
def test_what_is_no_site_is_refused(name: str, error: type[ActstoreError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_site(name)


def test_aliases_and_ranges_are_expanded_in_forward_order() -> None:
    existing = [Site(kind, layer) for kind in ("resid_pre", "z", "resid_post") for layer in range(4)]
    found = expand_sites(["model.layers.2.output", "z.0-1,3", "blocks.0.hook_resid_pre", "resid_post.2"], existing)
    assert list(map(str, found)) == ["resid_pre.0", "z.0", "z.1", "resid_post.2", "z.3"]
    with pytest.raises(UnknownName, match=r"resid_post\.9.*resid_post\.0-3"):
        expand_sites(["model.layers.9.output"], existing)


def _parsed(name: str) -> Site | None:
    try:
        return parse_site(name)
    except ActstoreError:
        return None


@pytest.mark.parametrize("name", CASES)
def test_a_module_path_is_the_tensor_of_that_module(name: str) -> None:
    causal_lm = CASES[name].model()
    batch = token_batch((7, 3))
    ends: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_module: Any, given: Any, keywords: Any, output: Any) -> None:
            ends[f"{path}.input"] = given[0] if given else keywords.get("hidden_states")
            ends[f"{path}.output"] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(path), with_kwargs=True) for path, module in causal_lm.named_modules()]
    with torch.no_grad():
        causal_lm(input_ids=batch[0], attention_mask=batch[1], use_cache=False)
    for handle in handles:
        handle.remove()
    named = {end: site for end in ends if (site := _parsed(end)) is not None}
    sites = captured(load_model(causal_lm), *batch, *set(named.values()))
    assert {site.kind for site in sites} >= {"resid_pre", "resid_post", "z", "mlp_act", "attn_out_raw", "mlp_out_raw"}
    for end, site in named.items():
        expected = sites[site]
        found = ends[end]
        if found.ndim == 4:  # heads apart, before the positions in some models
            found = found.transpose(1, 2) if found.shape[1] != expected.shape[1] else found
            found = found.flatten(2)
        assert torch.equal(found, expected), f"{end} is not {site}"
