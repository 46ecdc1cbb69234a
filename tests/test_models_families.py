"""Nine architectures, each with odd shapes: every site, the unembedding and the proof, against transformers alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models_support import CASES, N_LAYERS, Case, Layout, captured, token_batch

from actstore.errors import Unhealthy, UnknownName
from actstore.models import LoadedModel, load_model, logits, prove
from actstore.sites import Site, expand_sites

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case: Case) -> LoadedModel:
    return load_model(case.model())


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return token_batch((11, 6, 1))


@pytest.fixture(scope="module")
def reference(case: Case, model: LoadedModel, batch: tuple[torch.Tensor, torch.Tensor]) -> Tensors:
    return reference_of(model.causal_lm, case.layout, *batch)


def reference_of(model: Any, layout: Layout, token_ids: torch.Tensor, mask: torch.Tensor) -> Tensors:
    """Return every site, the logits and the patterns, from transformers' own outputs and hooks on whole modules."""
    with _recorded(model, layout) as raw, torch.no_grad():
        output = model(
            input_ids=token_ids,
            attention_mask=mask,
            use_cache=False,
            output_hidden_states=True,
            output_attentions=True,
        )
    found: Tensors = {"logits": output.logits, "final": output.hidden_states[-1]}
    found["embed_raw"] = model.get_submodule(layout.embedding).weight.detach()[token_ids]
    for index in range(N_LAYERS):
        parts = {name: raw[f"{name}.{index}"] for name in ("z", "act", "attention", "mlp", "mlp_input")}
        added = {name: raw.get(f"normed_{name}.{index}", parts[name]) for name in ("attention", "mlp")}
        before = output.hidden_states[index]
        sites = {
            "resid_pre": before,
            "z": parts["z"],
            "mlp_act": parts["act"],
            "attn_out_raw": parts["attention"],
            "mlp_out_raw": parts["mlp"],
            "attn_out": added["attention"],
            "mlp_out": added["mlp"],
            "resid_post": _last_residual(before, added, layout),
        }
        if not layout.parallel:
            sites["resid_mid"] = before + added["attention"]
        if layout.mlp_norm:
            sites["ln2"] = parts["mlp_input"]
            sites["ln2_normalized"] = _normalized(before if layout.parallel else sites["resid_mid"], model)
        sites |= dict(zip("qkv", _queries(model, layout, index, raw[f"attention_input.{index}"]), strict=True))
        found |= {f"{kind}.{index}": values for kind, values in sites.items()}
        found[f"pattern.{index}"] = output.attentions[index]
        if f"rotation_of_attention_input.{index}" in raw:
            found[f"rotation_of.{index}"] = raw[f"rotation_of_attention_input.{index}"]
        if index:
            assert torch.equal(found[f"resid_post.{index - 1}"], before)
    return found


class _recorded:
    """While it lasts, hooks keep what goes into and out of the parts of each layer."""

    def __init__(self, model: Any, layout: Layout) -> None:
        self.model, self.layout = model, layout
        self.found: Tensors = {}
        self.handles: list[Any] = []

    def __enter__(self) -> Tensors:
        layout = self.layout
        for index, layer in enumerate(self.model.get_submodule(layout.layers)):
            attention = layer.get_submodule(layout.attention)
            self._keep(attention, f"attention_input.{index}", f"attention.{index}")
            self._keep(attention.get_submodule(layout.attention_out), f"z.{index}", "")
            self._keep(layer.mlp, f"mlp_input.{index}", f"mlp.{index}")
            self._keep(layer.mlp.get_submodule(layout.down), f"act.{index}", "")
            for name, norm in zip(("attention", "mlp"), layout.post_norms or (), strict=False):
                self._keep(layer.get_submodule(norm), "", f"normed_{name}.{index}")
        return self.found

    def _keep(self, module: torch.nn.Module, before: str, after: str) -> None:
        def hook(_module: Any, given: Any, keywords: Any, output: Any) -> None:
            if "position_embeddings" in keywords:
                self.found[f"rotation_of_{before}"] = keywords["position_embeddings"]
            self.found[before] = given[0] if given else keywords["hidden_states"]
            self.found[after] = output[0] if isinstance(output, tuple) else output

        self.handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _last_residual(before: torch.Tensor, added: Tensors, layout: Layout) -> torch.Tensor:
    """Add in the order in which the layer adds: floating-point sums depend on it."""
    if layout.parallel:
        return added["mlp"] + added["attention"] + before
    return (before + added["attention"]) + added["mlp"]


def _normalized(values: torch.Tensor, model: Any) -> torch.Tensor:
    config = model.config.get_text_config()
    eps = getattr(config, "rms_norm_eps", None)
    if eps is not None:
        squares: torch.Tensor = values.double().pow(2).mean(-1, keepdim=True)
        normed: torch.Tensor = values / (squares + eps).sqrt()
        return normed
    eps = getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon
    centred: torch.Tensor = torch.nn.functional.layer_norm(values.double(), values.shape[-1:], eps=eps)
    return centred


@torch.no_grad()
def _queries(model: Any, layout: Layout, index: int, states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield queries, keys and values before their rotation, (batch, position, head after head)."""
    attention = model.get_submodule(f"{layout.layers}.{index}.{layout.attention}")
    if layout.queries == "thirds":
        yield from attention.c_attn(states).split(24, dim=2)
    elif layout.queries == "per_head":
        n_heads, d_head = 6, 4
        fused = attention.query_key_value(states)
        for part in range(3):
            columns = [
                fused[..., (3 * head + part) * d_head : (3 * head + part + 1) * d_head] for head in range(n_heads)
            ]
            yield torch.cat(columns, dim=-1)
    else:
        for name in ("q", "k"):
            projected = getattr(attention, f"{name}_proj")(states)
            norm = getattr(attention, f"{name}_norm", None)
            if layout.queries == "normed_flat":
                yield norm(projected)  # type: ignore[misc]
            elif layout.queries.startswith("normed_heads"):
                heads = projected.split(10, dim=-1)
                yield torch.cat([norm(head) for head in heads], dim=-1)  # type: ignore[misc]
            else:
                yield projected
        yield attention.v_proj(states)


def test_every_site_equals_what_transformers_computes(
    model: LoadedModel, batch: tuple[torch.Tensor, torch.Tensor], reference: Tensors
) -> None:
    found = captured(model, *batch, *model.sites())
    assert {str(site) for site in found} == {
        name for name in reference if not name.startswith("rotation_of") and name != "logits"
    }
    for site, values in found.items():
        width_axis = 1 if site.kind == "pattern" else -1  # of a pattern (sequence, head, query, key) the heads
        assert values.dtype == torch.float32 and values.shape[width_axis] == model.site_width(site)
        if site.kind == "ln2_normalized":
            torch.testing.assert_close(values.double(), reference[str(site)].double(), rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(values, reference[str(site)]), site


def test_every_site_in_bfloat16_is_near_float32(
    case: Case, batch: tuple[torch.Tensor, torch.Tensor], reference: Tensors
) -> None:
    coarse = load_model(case.model(torch.bfloat16))
    real = batch[1].bool()
    sites = [site for site in coarse.sites() if site.kind != "pattern"]  # an exponential of rounded scores
    for site, values in captured(coarse, *batch, *sites).items():
        assert values.dtype == torch.bfloat16
        expected = reference[str(site)][real].float()
        difference = (values[real].float() - expected).norm() / expected.norm()
        assert difference < 0.06, f"{site}: {difference:.3f}"


def test_values_weighted_by_the_pattern_are_z(
    model: LoadedModel, batch: tuple[torch.Tensor, torch.Tensor], reference: Tensors
) -> None:
    facts = model.facts
    for index in range(N_LAYERS):
        found = captured(model, *batch, Site("v", index), Site("z", index))
        values = torch.stack(torch.split(found[Site("v", index)], facts.d_head, dim=-1), dim=2)
        values = values.repeat_interleave(facts.n_heads // facts.n_kv_heads, dim=2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", reference[f"pattern.{index}"], values).flatten(2)
        torch.testing.assert_close(mixed, found[Site("z", index)], rtol=1e-4, atol=1e-5)


def test_queries_and_keys_make_the_pattern(
    case: Case, model: LoadedModel, batch: tuple[torch.Tensor, torch.Tensor], reference: Tensors
) -> None:
    facts, real = model.facts, batch[1].bool()
    for index in range(N_LAYERS):
        found = captured(model, *batch, Site("q", index), Site("k", index))
        q, k = (torch.stack(torch.split(found[Site(kind, index)], facts.d_head, dim=-1), dim=1) for kind in "qk")
        if f"rotation_of.{index}" in reference:
            rotate = vars(sys.modules[type(model.causal_lm).__module__])["apply_rotary_pos_emb"]
            q, k = rotate(q, k, *reference[f"rotation_of.{index}"])
        attention = model.causal_lm.get_submodule(f"{case.layout.layers}.{index}.{case.layout.attention}")
        k = k.repeat_interleave(facts.n_heads // facts.n_kv_heads, dim=1)
        scores = q @ k.transpose(2, 3) * getattr(attention, "scaling", facts.d_head**-0.5)
        if case.architecture == "Gemma2ForCausalLM":
            scores = 50 * torch.tanh(scores / 50)
        expected = reference[f"pattern.{index}"]
        pattern = scores.masked_fill(expected == 0, -torch.inf).softmax(dim=-1)
        torch.testing.assert_close(pattern.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)


def test_a_padded_batch_equals_single_runs(model: LoadedModel, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    token_ids, mask = batch
    together = captured(model, token_ids, mask, *model.sites())
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = captured(model, token_ids[row : row + 1, :length], mask[row : row + 1, :length], *model.sites())
        for site, values in alone.items():
            here = together[site][row]
            same = here[:, :length, :length] if site.kind == "pattern" else here[:length]
            torch.testing.assert_close(values[0], same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sound_model_passes_its_proofs(case: Case, dtype: torch.dtype) -> None:
    sound = load_model(case.model(dtype))
    names = {check.name for check in prove(sound, sound.sites())}
    assert {"mlp_act · W_down = mlp_out_raw", "z · W_O = attn_out_raw", "width"} <= names
    assert ("resid_pre + attn_out = resid_mid" in names) != case.layout.parallel
    assert ("post-norm(mlp_out_raw) = mlp_out" in names) == (case.layout.post_norms is not None)


def _tampered_places(layout: Layout) -> dict[str, str]:
    layer = f"{layout.layers}.1"
    norms = {"pre_norm": layout.mlp_norm} | dict(zip(("post_1", "post_2"), layout.post_norms or (), strict=False))
    return {
        "layer": layer,
        "attention": f"{layer}.{layout.attention}",
        "attention_out": f"{layer}.{layout.attention}.{layout.attention_out}",
        "mlp": f"{layer}.mlp",
        "down": f"{layer}.mlp.{layout.down}",
        "final_norm": layout.final_norm,
        **{name: f"{layer}.{norm}" for name, norm in norms.items() if norm},
    }


def test_a_model_with_one_scaled_module_is_refused(case: Case) -> None:
    tampered = load_model(case.model())
    for name, path in _tampered_places(case.layout).items():
        handle = tampered.causal_lm.get_submodule(path).register_forward_hook(_scale)
        with pytest.raises(Unhealthy):
            prove(tampered, [Site("resid_post", 1)])
            pytest.fail(f"{name} ({path}) was scaled, and nothing was noticed")
        handle.remove()
    prove(tampered, [Site("resid_post", 1)])


def _scale(_module: Any, _given: Any, output: Any) -> Any:
    return (output[0] * 1.1, *output[1:]) if isinstance(output, tuple) else output * 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_the_last_residual_are_the_models_own(
    case: Case, batch: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> None:
    loaded = load_model(case.model(dtype))
    last = Site("resid_post", N_LAYERS - 1)
    rows = captured(loaded, *batch, last)[last].flatten(0, 1)
    own = reference_of(loaded.causal_lm, case.layout, *batch)["logits"].flatten(0, 1).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(logits(loaded.unembedding(), rows), own, rtol=tolerance, atol=tolerance * 2)


def test_the_heads_of_z_through_the_output_weights_are_attn_out_raw(
    model: LoadedModel, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    z, raw, added = (Site(kind, 1) for kind in ("z", "attn_out_raw", "attn_out"))
    found = captured(model, *batch, z, raw, added)
    weight, gain = model.attention_output(1)
    assert weight.shape == (model.facts.query_width, model.facts.d_model)
    zeros = torch.zeros(1, model.facts.query_width)
    module = model.family.attention_output.format(layer=1)
    constant = model.causal_lm.get_submodule(module)(zeros).detach()
    torch.testing.assert_close(found[z] @ weight + constant, found[raw], rtol=1e-5, atol=2e-5)
    assert (gain is None) == torch.equal(found[raw], found[added])
    if gain is not None:
        scale = (found[raw].pow(2).mean(-1, keepdim=True) + model.facts.norm_eps).sqrt()
        torch.testing.assert_close(found[raw] / scale * gain, found[added], rtol=1e-5, atol=1e-5)


def test_what_an_architecture_lacks_is_refused_with_the_reason() -> None:
    parallel, without_pre_norm = (load_model(CASES[name].model()) for name in ("pythia", "olmo_2"))
    for wanted in ("resid_mid.0", "resid_mid.*", "resid_mid.0-1"):
        with pytest.raises(UnknownName, match=r"resid_mid.*parallel block both read resid_pre"):
            expand_sites([wanted], parallel.sites())
    with pytest.raises(UnknownName, match=r"ln2\.0.*no norm stands before.*resid_mid"):
        without_pre_norm.site_width(Site("ln2", 0))
