"""Logit prisms: what each part of a model adds to a logit, against transformers' logits and against sums by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit_support import STREAM, extract_family, logits_of, rows_of, weights_of
from models_support import N_LAYERS
from saes_support import write_saelens
from safetensors.numpy import load_file
from tiny_world import ATTENTION_SAE, RESIDUAL_SAE, extract, tiny_world

import actstore
from actstore.api import Store
from actstore.errors import MissingInput, UnknownName

LAST = f"resid_post.{N_LAYERS - 1}"
FAMILIES = ["gemma_2", "gemma_3_text", "llama_with_biases_tied", "olmo_2", "gpt_2", "pythia"]
TOKEN, OTHER = 5, 41


def prism(store: Store, row: int, token: int = TOKEN, against: int | None = None, sae: str | None = None) -> list[Any]:
    """Return the parts of one logit, as rows."""
    question = "SELECT unnest(attribution($row, $token, $against, $sae), recursive := true)"
    return store.sql(question, {"row": row, "token": token, "against": against, "sae": sae}).rows()


def sums(store: Store, token: int, against: int | None = None, sae: str | None = None) -> np.ndarray:
    """Return the sum of every row's parts."""
    question = """SELECT list_sum(list_transform(attribution(row, $token, $against, $sae),
                                                 lambda part: part.contribution)) AS total
                  FROM tokens ORDER BY row"""
    found = store.sql(question, {"token": token, "against": against, "sae": sae})
    return np.array([row["total"] for row in found.rows()])


def of(parts: list[Any], component: str) -> dict[Any, float]:
    """Return the contributions of one component by (layer, head, feature)."""
    chosen = [part for part in parts if part["component"] == component]
    return {(part["layer"], part["head"], part["feature"]): part["contribution"] for part in chosen}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, Any]]:
    """A float32 store of a tiny model with its whole residual stream, and the model."""
    out = tmp_path_factory.mktemp("family") / "a.act"
    model = extract_family(request.param, out)
    with actstore.open(out) as store:
        yield store, model


def test_a_prism_sums_to_transformers_own_logit_before_the_cap(family: tuple[Store, Any]) -> None:
    store, model = family
    before, after = logits_of(model, store, cap=False), logits_of(model, store)

    np.testing.assert_allclose(sums(store, TOKEN), before[:, TOKEN], atol=1e-4)
    np.testing.assert_allclose(sums(store, TOKEN, OTHER), before[:, TOKEN] - before[:, OTHER], atol=1e-4)
    np.testing.assert_allclose(sums(store, TOKEN, -1), before[:, TOKEN] - before.mean(1), atol=1e-4)
    asked = store.sql(f"SELECT lens_logits('{LAST}', row, [{TOKEN}, {OTHER}]) AS logits FROM tokens ORDER BY row")
    np.testing.assert_allclose([row["logits"] for row in asked.rows()], after[:, [TOKEN, OTHER]], atol=1e-4)


def test_rounding_is_next_to_nothing_in_a_float32_store(family: tuple[Store, Any]) -> None:
    store, _ = family
    for row in rows_of(store).tolist():
        assert abs(of(prism(store, row), "rounding")[None, None, None]) < 1e-4


def test_parts_of_the_stream_have_their_share_with_the_norm_frozen(family: tuple[Store, Any]) -> None:
    """Each summand of the stored stream by hand: embedding, each MLP, all heads of a layer with their bias."""
    store, model = family
    direction, _ = frozen(store, model)
    for row in rows_of(store).tolist():
        parts = prism(store, row)
        assert of(parts, "embedding")[None, None, None] == pytest.approx(
            store["resid_pre.0"][row].astype("f8") @ direction[row], abs=1e-5
        )
        heads, biases = of(parts, "head"), of(parts, "attn_out_bias")
        for layer in range(N_LAYERS):
            mlp = of(parts, "mlp_out")[layer, None, None]
            assert mlp == pytest.approx(store[f"mlp_out.{layer}"][row].astype("f8") @ direction[row], abs=1e-5)
            of_layer = sum(share for (at, _, _), share in heads.items() if at == layer) + biases.get(
                (layer, None, None), 0
            )
            attended = store[f"attn_out.{layer}"][row].astype("f8") @ direction[row]
            assert of_layer == pytest.approx(attended, abs=1e-4)


def frozen(store: Store, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return, by the final norm's own weights, what the logit of TOKEN reads from the stream, and its constant."""
    weights, rows = weights_of(model), rows_of(store)
    norm = next(
        name for name in weights if name.endswith(("ln_f.weight", "final_layer_norm.weight", "model.norm.weight"))
    )
    gain, is_layer = weights[norm], norm.replace("weight", "bias") in weights
    gain = gain + 1 if type(model).__name__.startswith("Gemma") else gain
    stream = store[LAST][rows].astype("f8")
    centred = stream - stream.mean(1, keepdims=True) if is_layer else stream
    epsilon = getattr(model.config, "rms_norm_eps", None) or getattr(
        model.config, "layer_norm_epsilon", getattr(model.config, "layer_norm_eps", None)
    )
    unembedding = model.get_output_embeddings().weight.detach().double().numpy()[TOKEN]
    read = gain * unembedding / np.sqrt((centred**2).mean(1, keepdims=True) + epsilon)
    read = read - read.mean(1, keepdims=True) if is_layer else read
    return read, np.asarray(weights[norm.replace("weight", "bias")] @ unembedding if is_layer else 0.0)


def test_a_layer_norms_bias_is_a_part_and_an_rms_norm_has_none(family: tuple[Store, Any]) -> None:
    store, model = family
    _, bias = frozen(store, model)
    found = of(prism(store, 2), "final_norm_bias")
    if type(model).__name__.startswith("GPT"):
        assert found[None, None, None] == pytest.approx(bias, abs=1e-6)
    else:
        assert found == {}


HEADS = {"gemma_2": "model.layers.1.self_attn.o_proj.weight", "gpt_2": "transformer.h.1.attn.c_proj.weight"}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_its_rows_of_w_o_behind_the_post_norm(tmp_path: Path, name: str) -> None:
    model = extract_family(name, tmp_path / "a.act")
    weights = weights_of(model)
    w_o = weights[HEADS[name]] if name == "gpt_2" else weights[HEADS[name]].T
    with actstore.open(tmp_path / "a.act") as store:
        direction, _ = frozen(store, model)
        for row in (1, 4):
            z = store["z.1"][row].astype("f8").reshape(6, -1)
            outs = np.einsum("hd,hdm->hm", z, w_o.reshape(6, z.shape[1], -1))
            if name == "gemma_2":
                scale = np.sqrt((outs.sum(0) ** 2).mean() + model.config.rms_norm_eps)
                outs = outs / scale * (1 + weights["model.layers.1.post_attention_layernorm.weight"])
            found = of(prism(store, row), "head")
            np.testing.assert_allclose([found[1, head, None] for head in range(6)], outs @ direction[row], atol=1e-6)


@pytest.mark.parametrize("name", ["gemma_2", "gpt_2"])
def test_a_bfloat16_store_sums_with_its_rounding(tmp_path: Path, name: str) -> None:
    """Computed in bfloat16, and computed in float32 but stored in bfloat16: the sum is the stored stream's logit."""
    for number, (dtype, stored) in enumerate(((torch.bfloat16, None), (torch.float32, "bfloat16"))):
        model = extract_family(name, tmp_path / f"{number}.act", dtype=dtype, storage_dtype=stored)
        with actstore.open(tmp_path / f"{number}.act") as store:
            stream = torch.from_numpy(store[LAST][rows_of(store)]).to(dtype)
            norm = model.transformer.ln_f if name == "gpt_2" else model.model.norm
            head = model.get_output_embeddings().weight.detach().double()
            with torch.no_grad():
                expected = norm(stream).double() @ head[TOKEN]
            roundings = [of(prism(store, row), "rounding")[None, None, None] for row in rows_of(store).tolist()]

            np.testing.assert_allclose(
                sums(store, TOKEN), expected.numpy(), atol=2e-2 if dtype is torch.bfloat16 else 1e-4
            )
            assert 1e-4 < np.abs(roundings).max() < 1


# What is stored decides what is told apart

STORED = {
    "without the embedding": (
        ["resid_post.*", "attn_out.*", "mlp_out.*"],
        ["attn_out", "mlp_out", "resid_post", "rounding"],
        0,
    ),
    "a hole": (
        ["resid_pre.*", "attn_out.*", "mlp_out.0", "mlp_out.2", LAST],
        ["attn_out", "mlp_out", "resid_pre", "rounding"],
        2,
    ),
    "nothing else": ([LAST], ["resid_post", "rounding"], 2),
    "modules' own outputs": (
        ["resid_pre.2", "attn_out_raw.2", "mlp_act.2", LAST],
        ["attn_out", "mlp_out", "resid_pre", "rounding"],
        2,
    ),
}


@pytest.mark.parametrize(("sites", "components", "first"), STORED.values(), ids=STORED)
def test_it_begins_with_the_earliest_state_that_all_is_stored_behind(
    tmp_path: Path, sites: list[str], components: list[str], first: int
) -> None:
    model = extract_family("gemma_2", tmp_path / "a.act", tuple(sites))
    with actstore.open(tmp_path / "a.act") as store:
        parts = prism(store, 3)
        assert sorted({part["component"] for part in parts}) == components
        assert min(part["layer"] for part in parts if part["layer"] is not None) == first
        assert abs(of(parts, "rounding")[None, None, None]) < 1e-4
        np.testing.assert_allclose(sums(store, TOKEN), logits_of(model, store, cap=False)[:, TOKEN], atol=1e-4)


def test_without_the_last_stream_there_is_none_and_the_command_is_named(tmp_path: Path) -> None:
    extract_family("llama", tmp_path / "a.act", ("resid_pre.0", "attn_out.*"))
    with (
        actstore.open(tmp_path / "a.act") as store,
        pytest.raises(MissingInput, match=rf"{LAST} is not stored.*actstore extract MODEL --into .* --site {LAST}"),
    ):
        prism(store, 0)


# By an SAE's features


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The tiny world with its whole stream, two SAEs and two layers' neurons."""
    out = tmp_path_factory.mktemp("world") / "a.act"
    saes = [tiny_world().residual_sae, tiny_world().attention_sae, "neurons:mlp_act.1", "neurons:mlp_out.2"]
    extract(out, sites=[*STREAM, "resid_post.1", "mlp_act.1"], saes=saes, lens_k=0, lens_sites=[])
    with actstore.open(out) as store:
        yield store


SAES = {
    "of the stream": (RESIDUAL_SAE, 1, {"attn_out": 0, "head": 4, "mlp_out": 1, "embedding": 0}),
    "of heads": (ATTENTION_SAE, 0, {"head": 8, "mlp_out": 3, "embedding": 1}),
    "neurons": ("1-neurons-mlp_act", 1, {"head": 12, "mlp_out": 2, "embedding": 1}),
    "what an MLP adds": ("2-neurons-mlp_out", 2, {"head": 12, "mlp_out": 2, "embedding": 1}),
}


@pytest.mark.parametrize(("sae", "layer", "others"), SAES.values(), ids=SAES)
def test_features_and_error_have_the_share_of_what_they_reconstruct(
    world: Store, sae: str, layer: int, others: dict[str, int]
) -> None:
    whole = sums(world, TOKEN, OTHER)
    np.testing.assert_allclose(sums(world, TOKEN, OTHER, sae), whole, atol=1e-12)
    for row in (
        world.sql("SELECT row FROM tokens WHERE NOT is_special ORDER BY hash(row) LIMIT 8").table["row"].to_pylist()
    ):
        parts = prism(world, row, TOKEN, OTHER, sae)
        assert {name: len(of(parts, name)) for name in others} == others
        assert abs(of(parts, "rounding")[None, None, None]) < 1e-4
        fired = world.activations(sae)[[row]]
        assert sorted(feature for _, _, feature in of(parts, "feature")) == sorted(fired.indices.tolist())
        assert {at for at, _, _ in of(parts, "feature")} == {layer}


def test_a_features_share_is_activation_times_direction_times_what_the_logit_reads(world: Store) -> None:
    row = int(world.sql("SELECT row FROM tokens WHERE pos = 5 LIMIT 1").scalar())
    w_o = load_file(tiny_world().model / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"].astype("f8").T
    scales = {RESIDUAL_SAE: 1.0, ATTENTION_SAE: np.sqrt(((world["z.0"][row].astype("f8") @ w_o) ** 2).mean() + 1e-6)}
    for sae, scale in scales.items():
        shares = of(prism(world, row, TOKEN, None, sae), "feature")
        fired = world.activations(sae)[[row]]
        assert len(shares) == len(fired.indices) > 0
        for feature, activation in zip(fired.indices.tolist(), fired.data.tolist(), strict=True):
            direction = np.array(world.sql("SELECT feature_direction(?, ?)", [sae, feature]).scalar())
            expected = activation * (direction / scale) @ read_of(world, row)
            assert shares[1 if sae == RESIDUAL_SAE else 0, None, feature] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def read_of(store: Store, row: int) -> np.ndarray:
    """Return what the logit of TOKEN reads from the stream of a model with an RMS norm: float64 (d_model)."""
    piece = store.reader.kit_piece(store.reader.kit_digest("unembedding", f"sites/{LAST}"))
    weight = np.asarray(piece["weight"])[TOKEN].astype("f8") * np.asarray(piece["gain"])
    return np.asarray(weight / np.sqrt((store[LAST][row].astype("f8") ** 2).mean() + piece.attrs["norm_epsilon"]))


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_a_normalising_sae_is_put_back_into_the_units_of_its_site(tmp_path: Path, normalisation: str) -> None:
    random, width = np.random.default_rng(0), 24
    arrays = {
        "W_enc": random.normal(size=(width, 60)),
        "W_dec": random.normal(size=(60, width)) / 5,
        "b_enc": random.normal(size=60),
        "b_dec": random.normal(size=width),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    folder = write_saelens(
        tmp_path,
        arrays,
        d_in=width,
        d_sae=60,
        architecture="standard",
        normalize_activations=normalisation,
        metadata={"hook_name": "blocks.1.hook_attn_out"},
    )
    sae = f"mine={folder}@attn_out.1"
    extract_family("llama", tmp_path / "a.act", saes=[sae], activation_bits=23)
    with actstore.open(tmp_path / "a.act") as store:
        for row in store.sql("SELECT row FROM tokens WHERE NOT is_special").table["row"].to_pylist():
            parts = prism(store, row, sae="mine")
            error = abs(of(parts, "feature_error")[1, None, None])
            x = store["attn_out.1"][row].astype("f8")
            z = x - arrays["b_dec"]
            scale, mean = 1.0, 0.0
            if normalisation == "layer_norm":
                scale, mean = x.std(ddof=1), x.mean()
                z = (x - mean) / (scale + 1e-5) - arrays["b_dec"]
            elif normalisation == "constant_norm_rescale":
                scale = np.linalg.norm(x) / width**0.5
                z = x / scale - arrays["b_dec"]
            features = np.maximum(z @ arrays["W_enc"] + arrays["b_enc"], 0)
            decoded = scale * (features @ arrays["W_dec"] + arrays["b_dec"]) + mean
            read = read_of(store, row)
            assert error == pytest.approx(abs((x - decoded) @ read), rel=1e-3, abs=1e-3)


def test_features_of_a_site_that_is_not_stored_or_not_followed_are_refused(tmp_path: Path) -> None:
    saes = [tiny_world().attention_sae, tiny_world().residual_sae]
    extract(tmp_path / "a.act", sites=["resid_post.1", "attn_out.2", LAST], saes=saes, lens_k=0, lens_sites=[])
    with actstore.open(tmp_path / "a.act") as store:
        with pytest.raises(MissingInput, match=r"z\.0 is not stored.*--site z\.0"):
            prism(store, 0, sae=ATTENTION_SAE)
        with pytest.raises(MissingInput, match=r"resid_post\.1 adds .* without mlp_out\.2.*--site mlp_out\.2"):
            prism(store, 0, sae=RESIDUAL_SAE)


def test_what_does_not_exist_is_refused_and_null_is_null(world: Store) -> None:
    with pytest.raises(UnknownName, match="There is no token 99999"):
        prism(world, 0, 99999)
    with pytest.raises(UnknownName, match="There is no token -2"):
        prism(world, 0, 3, -2)
    with pytest.raises(UnknownName, match="stored SAE 'nothing'"):
        prism(world, 0, sae="nothing")
    with pytest.raises(UnknownName, match="There is no row -1"):
        prism(world, -1)
    question = "SELECT row, attribution(CASE WHEN row % 2 = 0 THEN row END, 3, NULL, NULL) AS parts FROM tokens"
    found = world.sql(question).rows()
    assert all((row["parts"] is None) == (row["row"] % 2 == 1) for row in found) and len(found) > 20


# The named query


def test_the_named_query_orders_parts_by_size_and_knows_the_whole(world: Store) -> None:
    row = int(world.sql("SELECT row FROM tokens WHERE pos = 4 LIMIT 1").scalar())
    for token, given in ((TOKEN, {"token_id": TOKEN}), (None, {})):
        chosen = (
            token if token is not None else world.sql(f"SELECT top1_id FROM predictions WHERE row = {row}").scalar()
        )
        found = world.query("direct_attribution", {"row": row, "k": 6, **given}).rows()
        parts = sorted(prism(world, row, chosen), key=lambda part: -abs(part["contribution"]))
        assert [one["contribution"] for one in found] == [part["contribution"] for part in parts[:6]]
        assert found[0]["total"] == pytest.approx(sum(part["contribution"] for part in parts))
        assert found[0]["logit"] == pytest.approx(30 * np.tanh(found[0]["total"] / 30), abs=1e-4)
        assert found[0]["token"] == world.reader.vocabulary()[chosen].as_py()
    texts = world.reader.vocabulary().to_pylist()
    one, other = [number for number, text in enumerate(texts) if texts.count(text) == 1][20:22]
    by_text = world.query("direct_attribution", {"row": row, "token": texts[one], "against": texts[other]}).rows()
    assert by_text[0]["total"] == pytest.approx(sum(part["contribution"] for part in prism(world, row, one, other)))


def test_the_named_query_tells_an_saes_features_by_their_labels(world: Store) -> None:
    row = int(world.sql("SELECT row FROM tokens WHERE pos = 4 LIMIT 1").scalar())
    found = world.query("direct_attribution", {"row": row, "sae": RESIDUAL_SAE, "k": 100}).rows()
    assert {"feature", "feature_error", "feature_bias"} <= {one["component"] for one in found}
    assert found[0]["total"] == pytest.approx(world.query("direct_attribution", {"row": row}).rows()[0]["total"])
