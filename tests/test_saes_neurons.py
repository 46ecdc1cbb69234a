"""Neurons are features: of every row the k largest positive activations, from whole extractions and by brute force."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from asking_support import Truth
from models_support import CASES, VOCABULARY
from store_support import extract_some, hashes, index_content, truth
from tiny_world import RESIDUAL_SAE, extract, tiny_world
from transformers import AutoModelForCausalLM

import actstore
from actstore.errors import ActstoreError, InvalidInput, RecipeMismatch, UnknownName
from actstore.extraction import Request, plan_extraction
from actstore.extraction.directions import directions_of, way_of
from actstore.extraction.kit import feature_logits
from actstore.models import load_model
from actstore.recipe import SaeIdentity
from actstore.saes import EncodedTile, NeuronEncoder, expand_neurons, without_neurons
from actstore.sites import Site
from actstore.store import StoreReader

torch.set_num_threads(1)

SITES = [Site(kind, layer) for layer in range(3) for kind in ("resid_pre", "pattern", "z", "mlp_act")] + [Site("final")]
WIDTHS = {"resid_pre": 8, "z": 6, "mlp_act": 20, "final": 8}
TOP = 5
NEURONS, RESIDUAL, QUERIES = "1-neurons-mlp_act", "stream", "0-neurons-q"
Matrix = npt.NDArray[np.float64]


def expand(*arguments: str, n_kept: int = TOP) -> list[SaeIdentity]:
    return expand_neurons(arguments, SITES, lambda site: WIDTHS[site.kind], n_kept)


def largest(row: npt.NDArray[Any], k: int) -> dict[int, float]:
    """Return the k largest positive numbers of a row by their places; of equal ones the earlier."""
    places = sorted(range(len(row)), key=lambda place: (-row[place], place))[:k]
    return {place: float(row[place]) for place in sorted(places) if row[place] > 0}


def by_row(tile: EncodedTile) -> list[dict[int, float]]:
    bounds = np.concatenate([[0], np.cumsum(tile.counts.numpy())])
    pairs = list(zip(tile.features.tolist(), tile.activations.tolist(), strict=True))
    return [dict(pairs[first:last]) for first, last in pairwise(bounds)]


@pytest.mark.parametrize("n_kept", [1, 5, 19, 20, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_are_kept_and_all_are_counted(n_kept: int, dtype: torch.dtype) -> None:
    rows = torch.randn(40, 20, generator=torch.Generator().manual_seed(1)).mul(2).round().div(2).to(dtype)  # many ties
    rows[3], rows[4], rows[5, 2] = -1.0, 0.0, torch.nan
    listed = torch.arange(40) % 7 > 0
    (identity,) = expand("neurons:mlp_act.1", n_kept=n_kept)
    assert identity.truncated_to == (n_kept if n_kept < 20 else None)
    tile = NeuronEncoder(identity).encode(rows, listed)
    values = rows.float().numpy()
    kept = [largest(row, n_kept) if np.isfinite(row).all() else {} for row in values]
    assert by_row(tile) == [one if listed[number] else {} for number, one in enumerate(kept)]
    for number, (l0, norm, error) in enumerate(tile.reconstruction.tolist()):
        if number == 5:
            assert np.isnan([l0, norm, error]).all()
            continue
        decoded = np.zeros(20)
        decoded[list(kept[number])] = list(kept[number].values())
        assert l0 == (values[number] > 0).sum()
        assert norm == pytest.approx(np.linalg.norm(values[number].astype(float)))
        assert error == pytest.approx(np.linalg.norm(values[number] - decoded))


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"shape \(3, 8\).*\(row, 20\)"):
        NeuronEncoder(expand("neurons:mlp_act.1")[0]).encode(torch.zeros(3, 8))


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ("neurons:mlp_act.1", {"1-neurons-mlp_act": "mlp_act.1"}),
        ("mine=neurons:mlp_act.1", {"mine": "mlp_act.1"}),
        ("neurons:mlp_act.*", {f"{layer}-neurons-mlp_act": f"mlp_act.{layer}" for layer in range(3)}),
        ("neurons:mlp_act.1-2", {f"{layer}-neurons-mlp_act": f"mlp_act.{layer}" for layer in (1, 2)}),
        ("neurons:z.0,2", {f"{layer}-neurons-z": f"z.{layer}" for layer in (0, 2)}),
        ("neurons:blocks.2.mlp.hook_post", {"2-neurons-mlp_act": "mlp_act.2"}),
        ("neurons:final", {"neurons-final": "final"}),
    ],
)
def test_arguments_name_sites(argument: str, found: dict[str, str]) -> None:
    neurons = expand("some/folder", argument)
    assert {one.sae: one.site for one in neurons} == found
    assert all((one.architecture, one.width) == ("neurons", one.d_in) for one in neurons)
    assert without_neurons(["some/folder", argument, "a=b@z.1"]) == ["some/folder", "a=b@z.1"]


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("mine=neurons:mlp_act.*", InvalidInput, "names 3 sites, and there is one id 'mine'"),
        ("neurons:mlp_act.3", UnknownName, r"mlp_act\.3"),
        ("neurons:mlp_act.1@z.1", InvalidInput, "names a site twice"),
        ("neurons:pattern.0", InvalidInput, "another key on every row.*--attention-top"),
    ],
)
def test_arguments_that_are_refused(argument: str, error: type[ActstoreError], message: str) -> None:
    with pytest.raises(error, match=message):
        expand(argument)


def options(**changes: Any) -> dict[str, Any]:
    asked = ["neurons:mlp_act.1", "stream=neurons:resid_post.1", "neurons:z.0", "neurons:q.0"]
    own = {
        "saes": [tiny_world().residual_sae, *asked],
        "sites": ["mlp_act.1", "resid_post.1", "z.0", "q.0"],
        "neurons_top": TOP,
        "activation_bits": 23,
        "lens_k": 0,
        "lens_sites": [],
        "shard_rows": 128,
        "allow_unhealthy": True,
    }
    return own | changes


@cache
def _home() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="neurons-")


@cache
def store() -> Path:
    path = Path(_home().name) / "whole.act"
    assert extract(path, **options()).complete
    return path


@pytest.mark.parametrize(
    ("sae", "site"), [(NEURONS, "mlp_act.1"), (RESIDUAL, "resid_post.1"), ("0-neurons-z", "z.0"), (QUERIES, "q.0")]
)
def test_firings_are_the_largest_of_the_stored_site(sae: str, site: str) -> None:
    stored = Truth(StoreReader(store()))
    values, firings = stored.matrix(f"sites/{site}"), stored.firings(sae)
    found: list[dict[int, float]] = [{} for _ in values]
    places = stored.places(firings.row)
    for place, feature, activation in zip(places, firings.feature, firings.activation, strict=True):
        found[place][int(feature)] = float(activation)
    special = stored.field("flags") & 1 != 0
    assert special.any() and len(firings.row) > 100
    assert found == [{} if special[place] else largest(row, TOP) for place, row in enumerate(values)]
    reconstruction = stored.matrix(f"reconstruction/{sae}")
    np.testing.assert_array_equal(reconstruction[:, 0], (values > 0).sum(1))  # what fires, not what is kept
    np.testing.assert_allclose(reconstruction[:, 1], np.linalg.norm(values, axis=1), rtol=1e-5)


def test_the_table_says_what_was_kept() -> None:
    with actstore.open(store()) as opened:
        rows = opened.sql("SELECT sae, site, width, architecture, truncated_to FROM saes ORDER BY sae").rows()
        assert [tuple(row.values()) for row in rows if row["architecture"] == "neurons"] == [
            ("0-neurons-q", "q.0", 40, "neurons", TOP),
            ("0-neurons-z", "z.0", 40, "neurons", TOP),
            ("1-neurons-mlp_act", "mlp_act.1", 36, "neurons", TOP),
            ("stream", "resid_post.1", 32, "neurons", TOP),
        ]
        assert next(row["truncated_to"] for row in rows if row["sae"] == RESIDUAL_SAE) is None


def test_top_examples_and_statistics_are_those_of_the_kept_firings() -> None:
    stored = Truth(StoreReader(store()))
    all_ = stored.plain_firings(NEURONS)
    feature = int(np.bincount(all_.feature).argmax())
    own = stored.plain_firings(NEURONS, feature)
    order = np.lexsort((own.row, -own.activation))[:7]
    question = """SELECT a.row, a.activation, t.token, snippet(a.row, 3, 3) AS example
        FROM examples a JOIN tokens t USING (row) WHERE a.sae = ? AND a.feature = ? ORDER BY a.rank LIMIT 7"""
    with actstore.open(store()) as opened:
        rows = opened.sql(question, [NEURONS, feature]).rows()
        n_firings = opened.sql("SELECT n_firings FROM features WHERE sae = ? AND feature = ?", [NEURONS, feature])
        assert n_firings.scalar() == len(own.row)
    assert [row["row"] for row in rows] == own.row[order].tolist()
    assert [row["activation"] for row in rows] == own.activation[order].tolist()
    assert [row["example"] for row in rows] == [stored.snippet(int(row), 3, 3) for row in own.row[order]]


def test_nothing_is_to_be_proved_of_neurons() -> None:
    with actstore.open(store()) as opened:
        subjects = {row["subject"] for row in opened.sql("SELECT subject FROM health").rows()}
    assert any(RESIDUAL_SAE in subject for subject in subjects)
    assert not any("neurons" in subject or RESIDUAL in subject for subject in subjects)


def _written_logits(model: Any, directions: Matrix) -> Matrix:
    """Gemma 2: through the final norm's gain and the unembedding, the vocabulary's mean subtracted."""
    gain = 1 + model.model.norm.weight.detach().double().numpy()
    logits = directions * gain @ model.lm_head.weight.detach().double().numpy().T
    centred: Matrix = logits - logits.mean(1, keepdims=True)
    return centred


def test_feature_logits_are_what_each_neuron_writes() -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_world().model)
    layers = model.model.layers
    w_down = layers[1].mlp.down_proj.weight.detach().double().numpy().T
    w_o = layers[0].self_attn.o_proj.weight.detach().double().numpy().T
    mlp_gain = 1 + layers[1].post_feedforward_layernorm.weight.detach().double().numpy()
    attention_gain = 1 + layers[0].post_attention_layernorm.weight.detach().double().numpy()
    reader = StoreReader(store())
    for sae, directions in (
        (NEURONS, w_down * mlp_gain),
        ("0-neurons-z", w_o * attention_gain),
        (RESIDUAL, np.eye(32)),
    ):
        _check_logits(reader.feature_logits(sae), _written_logits(model, directions))
    assert reader.feature_logits(QUERIES) is None


def _check_logits(found: Any, logits: Matrix) -> None:
    token_ids, values = found
    expected = np.concatenate([-np.sort(-logits, axis=1)[:, :10], np.sort(logits, axis=1)[:, :10]], axis=1)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    picked = np.take_along_axis(logits, token_ids.astype(np.int64), 1)
    np.testing.assert_allclose(picked, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp_act", "mlp_out_raw", "mlp_out", "resid_post", "z"])
def test_feature_logits_behind_a_layer_norm(kind: str) -> None:
    causal_lm = CASES["gpt_2"].model()
    model = load_model(causal_lm, dtype="float32", device="cpu")
    block = causal_lm.transformer.h[2]
    matrix = {"mlp_act": block.mlp.c_proj.weight, "z": block.attn.c_proj.weight}.get(kind, torch.eye(24))
    directions = matrix.detach().double().numpy()
    directions = directions - directions.mean(1, keepdims=True)
    logits = directions * causal_lm.transformer.ln_f.weight.detach().double().numpy()
    logits = logits @ causal_lm.lm_head.weight.detach().double().numpy().T
    (identity,) = expand_neurons([f"neurons:{kind}.2"], model.sites(), model.site_width, TOP)
    assert logits.shape == (identity.width, VOCABULARY)
    found = directions_of(way_of(model, Site(kind, 2)), NeuronEncoder(identity), model.device)
    assert found is not None
    _check_logits(feature_logits(model.unembedding(), found), logits - logits.mean(1, keepdims=True))


def test_a_stopped_extraction_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    out = tmp_path / "stopped.act"
    extract_some(out, 1, **options())
    extract(out, **options())
    assert truth(out) == truth(store())
    assert index_content(out) == index_content(store())


def test_neurons_added_later_are_the_same(tmp_path: Path) -> None:
    out = tmp_path / "later.act"
    extract(out, **options(saes=[], sites=["mlp_act.1"]))
    later = options(saes=["neurons:mlp_act.1"], sites=[], dataset=None, into=True)
    assert extract(out, **later).complete and extract(out, **later).n_shards_made == 0
    arrays = f"firings/{NEURONS}", f"arrays/reconstruction/{NEURONS}"
    assert hashes(out, *arrays) == hashes(store(), *arrays) != {}


def test_another_number_to_keep_is_another_recipe() -> None:
    with pytest.raises(RecipeMismatch, match=f"sae {NEURONS}: .*sae stream"):
        extract(store(), **options(neurons_top=TOP + 1))


def request(out: Path, *saes: str, **changes: Any) -> Request:
    world = tiny_world()
    named: dict[str, Any] = {"model": str(world.model), "dataset": str(world.dataset), "out": out, "context": 24}
    return Request(saes=saes, device="cpu", **named | changes)


@pytest.mark.parametrize(("n_kept", "firings_a_row"), [(5, 5), (36, 36), (1000, 36)])
def test_the_plan_counts_what_is_kept(tmp_path: Path, n_kept: int, firings_a_row: int) -> None:
    plan = plan_extraction(request(tmp_path / "a.act", "neurons:mlp_act.1", neurons_top=n_kept))
    (size,) = (size for size in plan.artifacts if size.artifact == f"firings/{NEURONS}")
    feature_logits = 36 * 100
    assert size.n_bytes == int(plan.n_rows * (firings_a_row * 3.5 + 3 * 4)) + feature_logits


def test_a_number_to_keep_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--neurons-top is 0"):
        request(tmp_path / "a.act", "neurons:mlp_act.1", neurons_top=0)


def test_two_of_one_name_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    with pytest.raises(InvalidInput, match="'1-neurons-mlp_act' is given twice"):
        extract(out, **options(saes=["neurons:mlp_act.1", "neurons:mlp_act.*"]))
    with pytest.raises(InvalidInput, match=f"'{RESIDUAL_SAE}' is given twice"):
        extract(out, **options(saes=[tiny_world().residual_sae, f"{RESIDUAL_SAE}=neurons:mlp_act.1"]))
    assert not out.exists()
