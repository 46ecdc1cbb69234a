"""Every site is what its name says (DESIGN §5), on random models of odd shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models_support import N_LAYERS, captured, reference_sites, tiny_model, token_batch

from actstore.errors import UnknownName
from actstore.models import LoadedModel, load_model, logits
from actstore.sites import Site, parse_site

Batch = tuple[torch.Tensor, torch.Tensor]

GROUPS = [
    pytest.param({}, id="two_query_heads_per_key"),
    pytest.param({"num_attention_heads": 3, "num_key_value_heads": 1}, id="one_key_head"),
    pytest.param({"tie_word_embeddings": False, "final_logit_softcapping": None}, id="untied_and_uncapped"),
]


def flat_sites(model: LoadedModel) -> list[Site]:
    """Return every site but patterns, which have two axes of positions: tests/test_attention_proof.py has them."""
    return [site for site in model.sites() if site.kind != "pattern"]


@pytest.fixture(scope="module", params=GROUPS)
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return load_model(tiny_model(**request.param))


@pytest.fixture
def batch() -> Batch:
    return token_batch((11, 6, 1))


def test_every_site_equals_what_the_model_computes(model: LoadedModel, batch: Batch) -> None:
    reference = reference_sites(model.causal_lm, *batch)
    found = captured(model, *batch, *flat_sites(model))
    assert {str(site) for site in found} == reference.keys() - {"logits"}
    for site, values in found.items():
        assert values.dtype == torch.float32
        if site.kind == "ln2_normalized":
            torch.testing.assert_close(values.double(), reference[str(site)], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(values, reference[str(site)]), site


def test_every_site_in_bfloat16_is_near_float32(batch: Batch) -> None:
    coarse, exact = load_model(tiny_model(dtype=torch.bfloat16)), load_model(tiny_model())
    found, expected = (captured(one, *batch, *flat_sites(one)) for one in (coarse, exact))
    real = batch[1].bool()
    for site, values in found.items():
        assert values.dtype == torch.bfloat16
        difference = (values[real].float() - expected[site][real]).norm() / expected[site][real].norm()
        assert difference < 0.06, f"{site}: {difference:.3f}"


def test_sites_come_in_forward_order_with_their_widths(model: LoadedModel, batch: Batch) -> None:
    order: list[Site] = []
    widths: dict[Site, int] = {}

    def deposit(site: Site, values: torch.Tensor) -> None:
        order.append(site)
        widths[site] = values.shape[-1]

    model.capture(*batch, reversed(flat_sites(model)), deposit)
    layer_inputs_once = [site for site in order if site.kind == "ln2_normalized"]
    assert len(order) == len(set(order)) == len(flat_sites(model)) and len(layer_inputs_once) == N_LAYERS
    assert [site.layer for site in order] == [site.layer for site in flat_sites(model)]
    assert widths == {site: model.site_width(site) for site in flat_sites(model)}


def test_the_last_resid_post_is_before_the_final_norm(model: LoadedModel, batch: Batch) -> None:
    last, final = Site("resid_post", N_LAYERS - 1), Site("final")
    found = captured(model, *batch, last, final)
    assert not torch.allclose(found[last], found[final])
    assert torch.equal(model.causal_lm.model.norm(found[last]), found[final])


def test_a_padded_batch_equals_single_runs(model: LoadedModel, batch: Batch) -> None:
    token_ids, mask = batch
    together = captured(model, token_ids, mask, *flat_sites(model))
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = captured(model, token_ids[row : row + 1, :length], mask[row : row + 1, :length], *flat_sites(model))
        for site, values in alone.items():
            torch.testing.assert_close(values[0], together[site][row, :length], rtol=1e-4, atol=1e-4)


def test_what_padding_holds_does_not_matter(model: LoadedModel, batch: Batch) -> None:
    token_ids, mask = batch
    other = torch.where(mask.bool(), token_ids, 5)
    site = Site("resid_post", 2)
    first, second = (captured(model, ids, mask, site)[site][mask.bool()] for ids in (token_ids, other))
    assert torch.equal(first, second)


@pytest.fixture
def layers_run(model: LoadedModel) -> Iterator[list[int]]:
    run: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda _m, _a, index=index: run.append(index))
        for index, layer in enumerate(model.causal_lm.model.layers)
    ]
    yield run
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        pytest.param(("resid_pre.0",), [0], id="first_input"),
        pytest.param(("resid_post.0", "z.1"), [0, 1], id="inside_layer_1"),
        pytest.param(("final",), [0, 1, 2], id="final_norm"),
    ],
)
def test_the_pass_stops_behind_the_deepest_site(
    model: LoadedModel, batch: Batch, layers_run: list[int], sites: tuple[str, ...], expected: list[int]
) -> None:
    captured(model, *batch, *map(parse_site, sites))
    assert layers_run == expected


def test_without_stop_every_layer_runs(model: LoadedModel, batch: Batch, layers_run: list[int]) -> None:
    model.capture(*batch, [Site("z", 0)], lambda _site, _values: None, stop=False)
    assert layers_run == [0, 1, 2]


def test_the_head_is_never_run(model: LoadedModel, batch: Batch) -> None:
    handle = model.causal_lm.lm_head.register_forward_hook(lambda *_: pytest.fail("the unembedding ran"))
    captured(model, *batch, Site("final"))
    handle.remove()


def _hooks(model: LoadedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.causal_lm.modules())


def test_no_hook_is_left_after_a_capture_or_a_failing_deposit(model: LoadedModel, batch: Batch) -> None:
    def fail(site: Site, values: torch.Tensor) -> None:
        raise KeyError("the writer is gone")

    before = _hooks(model)
    captured(model, *batch, *flat_sites(model))
    with pytest.raises(KeyError, match="the writer is gone"):
        model.capture(*batch, model.sites(), fail)
    assert _hooks(model) == before


def test_captured_values_carry_no_graph(model: LoadedModel, batch: Batch) -> None:
    found = captured(model, *batch, Site("resid_post", 1))
    assert not found[Site("resid_post", 1)].requires_grad


@pytest.mark.parametrize("name", ["resid_post.3", "pattern.3", "q.7"])
def test_a_site_that_is_not_there_is_refused_with_what_is(model: LoadedModel, batch: Batch, name: str) -> None:
    with pytest.raises(UnknownName, match=r"resid_post\.0-2"):
        model.capture(*batch, [parse_site(name)], lambda _site, _values: None)
    with pytest.raises(UnknownName, match=r"resid_post\.0-2"):
        model.site_width(parse_site(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_the_last_residual_are_the_models_own(dtype: torch.dtype, batch: Batch) -> None:
    loaded = load_model(tiny_model(dtype=dtype))
    last = Site("resid_post", N_LAYERS - 1)
    rows = captured(loaded, *batch, last)[last].flatten(0, 1)
    own = reference_sites(loaded.causal_lm, *batch)["logits"].flatten(0, 1)
    found = logits(loaded.unembedding(), rows)
    assert found.dtype == torch.float32 and found.abs().max() < 30
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found, own.float(), rtol=tolerance, atol=tolerance)


def test_logits_do_not_depend_on_how_the_vocabulary_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    unembedding = load_model(tiny_model(dtype=torch.bfloat16)).unembedding()
    rows = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    whole = logits(unembedding, rows)
    monkeypatch.setattr("actstore.models.unembedding._WIDENED_ROWS", 10)
    torch.testing.assert_close(logits(unembedding, rows), whole, rtol=1e-6, atol=1e-6)


def test_the_heads_of_z_through_the_output_weights_give_attn_out(model: LoadedModel, batch: Batch) -> None:
    z, raw, added = (Site(kind, 1) for kind in ("z", "attn_out_raw", "attn_out"))
    found = captured(model, *batch, z, raw, added)
    weight, gain = model.attention_output(1)
    d_head, n_heads = model.facts.d_head, model.facts.n_heads
    per_head = [
        found[z][..., h * d_head : (h + 1) * d_head] @ weight[h * d_head : (h + 1) * d_head] for h in range(n_heads)
    ]
    torch.testing.assert_close(torch.stack(per_head).sum(0), found[raw], rtol=1e-5, atol=1e-5)
    assert gain is not None
    scale = (found[raw].pow(2).mean(-1, keepdim=True) + model.facts.norm_eps).sqrt()
    torch.testing.assert_close(found[raw] / scale * gain, found[added], rtol=1e-5, atol=1e-5)
