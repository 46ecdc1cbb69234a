"""Queries for any feature, row, document or head, against the bytes of the store as zarr alone reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from asking_support import ALWAYS, ATT, DEAD, MODEL, RES, SmallStore, Truth, embedded_texts, firing_arrays
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from queries_support import Dense, assert_ranked
from saes_support import write_sae
from safetensors.numpy import load_file
from zarr.storage import ZipStore

import actstore
from actstore.api import Store
from actstore.errors import InvalidInput, QueryError
from actstore.named import named_query

WIDTHS = {RES: 256, ATT: 96}
ASKED = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SAES, FEATURES = st.sampled_from([RES, ATT]), st.integers(0, 95)


@pytest.fixture(scope="module")
def truth(small: SmallStore) -> Truth:
    return small.truth


@pytest.fixture(scope="module")
def dense(truth: Truth) -> dict[str, Dense]:
    return {sae: Dense(truth, sae, width) for sae, width in WIDTHS.items()}


# The truth of these tests


def test_what_tests_compare_with_is_what_zarr_reads(small: SmallStore, truth: Truth) -> None:
    """No reader of actstore's: the Zarr hierarchy, the zip of each shard's firings, and docs/format.md."""
    group = zarr.open_group(small.path / "arrays", mode="r")
    tokens = np.asarray(group["corpus/tokens"])
    used = np.flatnonzero(tokens[:, 0] >= 0)
    np.testing.assert_array_equal(truth.rows, used)
    for place, name in enumerate(("token_id", "seq", "pos", "char_start", "char_end", "flags", "role")):
        np.testing.assert_array_equal(truth.field(name), tokens[used, place])
    names = [f"sites/{site}" for site in ("resid_post.3", "z.2", "final")]
    names += ["predictions/values", "predictions/ids", f"reconstruction/{RES}", "lens/logit/resid_post.2/ids"]
    for name in names:
        np.testing.assert_array_equal(truth.matrix(name), np.asarray(group[name])[used])
    shard_rows = json.loads((small.path / "store.json").read_bytes())["shard_rows"]
    for sae in WIDTHS:
        fired = []
        for shard in range(len(tokens) // shard_rows):
            csr = zarr.open_group(ZipStore(small.path / "firings" / sae / f"{shard}.zip", mode="r"), mode="r")
            counts = np.diff(np.asarray(csr["indptr"]))
            rows = np.repeat(np.arange(shard_rows), counts) + shard * shard_rows
            fired.append(np.stack([rows, np.asarray(csr["indices"]), np.asarray(csr["data"])]))
        stored = truth.firings(sae)
        raw = np.concatenate(fired, axis=1)
        np.testing.assert_array_equal(np.stack([stored.row, stored.feature, stored.activation]), raw)


# Any feature, row, document


@ASKED
@given(sae=SAES, feature=FEATURES, k=st.integers(1, 400), per_document=st.integers(0, 4))
def test_the_strongest_firings_of_any_feature(
    opened: Store, truth: Truth, dense: dict[str, Dense], sae: str, feature: int, k: int, per_document: int
) -> None:
    asked = {"sae": sae, "feature": feature, "k": k, "per_document": per_document}
    found = opened.query("max_activating", asked).rows()
    values, rows, docs = dense[sae].plain[:, feature], truth.rows[truth.plain], truth.doc[truth.plain]
    order = np.lexsort((rows, -values))[: (values > 0).sum()]
    place = [int((docs[order[:n]] == docs[one]).sum()) for n, one in enumerate(order)]
    kept = [one for one, before in zip(order, place, strict=True) if not per_document or before < per_document][:k]
    assert [(one["row"], one["activation"]) for one in found] == [(rows[one], values[one]) for one in kept]
    if per_document:
        fired = [int(((docs == one["doc"]) & (values > 0)).sum()) for one in found]
        assert [one["n_merged"] for one in found] == fired


@ASKED
@given(sae=SAES, k=st.integers(1, 300))
def test_statistics_of_any_feature(opened: Store, dense: dict[str, Dense], sae: str, k: int) -> None:
    found = opened.query("feature_stats", {"sae": sae, "k": k}).rows()
    plain = dense[sae].plain
    counts = (plain > 0).sum(axis=0)
    order = np.lexsort((np.arange(len(counts)), -counts))[:k]
    assert [one["feature"] for one in found] == order.tolist()
    for one in found:
        values = np.sort(plain[:, one["feature"]][plain[:, one["feature"]] > 0])
        assert (one["n_firings"], one["n_dead"]) == (len(values), (counts == 0).sum())
        assert one["density"] == pytest.approx(len(values) / len(plain))
        if len(values):
            ranks = [-(-len(values) * percent // 100) - 1 for percent in (50, 90, 99)]
            assert [one["p50"], one["p90"], one["p99"], one["max_activation"]] == [*values[ranks], values[-1]]
            assert one["mean_activation"] == pytest.approx(values.mean())
            assert one["std_activation"] == pytest.approx(values.std(), abs=1e-9)


@ASKED
@given(sae=SAES, other=SAES, feature=FEATURES, by=st.sampled_from(["jaccard", "pmi"]), least=st.integers(1, 30))
def test_partners_of_any_feature(
    opened: Store, dense: dict[str, Dense], sae: str, other: str, feature: int, by: str, least: int
) -> None:
    asked = {"sae": sae, "feature": feature, "other": other, "by": by, "min_both": least}
    found = opened.query("coactivation", asked).rows()
    own, theirs = dense[sae].plain[:, feature] > 0, dense[other].plain > 0
    both, counts = theirs[own].sum(axis=0), theirs.sum(axis=0)
    partners = [one for one in np.flatnonzero(both >= least).tolist() if (sae, feature) != (other, one)]
    expected = {
        one: {
            "n_both": both[one],
            "jaccard": both[one] / (own.sum() + counts[one] - both[one]),
            "pmi": np.log(both[one] * len(own) / own.sum() / counts[one]),
        }
        for one in partners
    }
    assert_ranked(found, expected, by, 20, "n_both")


@ASKED
@given(sae=SAES, feature=FEATURES, k=st.integers(1, 60))
def test_tokens_of_any_feature(
    opened: Store, truth: Truth, dense: dict[str, Dense], sae: str, feature: int, k: int
) -> None:
    found = opened.query("feature_tokens", {"sae": sae, "feature": feature, "k": k}).rows()
    values, ids = dense[sae].plain[:, feature], truth.field("token_id")[truth.plain]
    expected: dict[int, dict[str, Any]] = {}
    for token_id in np.unique(ids[values > 0]).tolist():
        fired = values[(ids == token_id) & (values > 0)]
        lift = len(fired) / (ids == token_id).sum() / (values > 0).mean()
        score = {"score": len(fired) * np.log(lift), "lift": lift, "n_firings": len(fired)}
        expected[token_id] = score | {"mean_activation": fired.mean(), "max_activation": fired.max()}
    assert_ranked(found, expected, "score", k, key="token_id")


@ASKED
@given(sae=SAES, feature=FEATURES, doc=st.integers(0, 44))
def test_any_feature_in_any_document(
    opened: Store, truth: Truth, dense: dict[str, Dense], sae: str, feature: int, doc: int
) -> None:
    found = opened.query("feature_in_document", {"sae": sae, "feature": feature, "doc": doc}).numpy()
    np.testing.assert_array_equal(found["row"], truth.rows[truth.doc == doc])
    np.testing.assert_array_equal(found["activation"], dense[sae].values[truth.doc == doc, feature])


@ASKED
@given(sae=SAES, place=st.integers(0, 800), k=st.integers(1, 40))
def test_features_of_any_token(
    opened: Store, truth: Truth, dense: dict[str, Dense], sae: str, place: int, k: int
) -> None:
    found = opened.query("token_features", {"sae": sae, "row": int(truth.rows[place]), "k": k}).rows()
    values = dense[sae].values[place]
    order = np.lexsort((np.arange(len(values)), -values))[: min(k, (values > 0).sum())]
    assert [(one["feature"], one["activation"]) for one in found] == [(one, values[one]) for one in order]
    most = dense[sae].plain.max(axis=0)
    assert [one["share"] for one in found] == pytest.approx([values[one] / most[one] for one in order])


# A store with a lens at every site of the stream, an SAE beside it, features that write nothing, and all the parts


LAYERS, STREAM = 6, ("resid_pre", "resid_mid", "resid_post")
BESIDE, SILENT = "beside", [2, 11]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("deep")
    random = np.random.default_rng(5)
    written = firing_arrays(random.normal(size=(300, 128)) * 3, 32, 3)
    written["W_dec"][SILENT] = 0
    beside = firing_arrays(random.normal(size=(300, 96)) * 3, 24, 4)
    stream = write_sae(folder, "layer_3/width_32/average_l0_3", written, release="deep-scope-res")
    queries = write_sae(folder, "layer_3/width_24/average_l0_3", beside, release="deep-scope-q")
    actstore.extract(
        MODEL,
        embedded_texts(8)[5:],
        out=folder / "deep.act",
        sites=["resid_pre.0", "z.*", "mlp_out.*", "resid_post.5"],
        saes=[f"stream={stream}@resid_post.3", f"{BESIDE}={queries}@q.3"],
        lens_k=1,
        lens_sites=["resid_*"],
        dtype="float32",
        device="cpu",
        allow_unhealthy=True,
    )
    with actstore.open(folder / "deep.act") as store:
        yield store


@pytest.mark.parametrize("doc", [0, 3, 6])
def test_the_final_answer_leads_from_where_no_deeper_site_says_another(deep: Store, doc: int) -> None:
    group = zarr.open_group(Path(deep.url) / "arrays", mode="r")
    found = deep.query("lens_trajectory", {"doc": doc}).rows()
    sites = [f"{kind}.{layer}" for layer in range(LAYERS) for kind in STREAM]
    rows = list(dict.fromkeys(one["row"] for one in found))
    assert [(one["row"], one["site"]) for one in found] == [(row, site) for row in rows for site in sites]
    top = np.stack([np.asarray(group[f"lens/logit/{site}/ids"])[:, 1] for site in sites], axis=1)
    right = top == np.asarray(group["predictions/ids"])[:, 1:2]
    expected = {}
    for row in rows:
        wrong = np.flatnonzero(~right[row])
        first = wrong[-1] + 1 if len(wrong) else 0
        expected[row] = first // len(STREAM) if first < len(sites) else None
    assert {one["row"]: one["leads_from"] for one in found} == expected
    # A layer whose own earlier sites said another token: it counts, though not whole.
    assert any(not right[row, 3 * layer : 3 * layer + 3].all() for row, layer in expected.items() if layer is not None)


def test_a_lens_that_is_not_stored_is_an_error(deep: Store) -> None:
    with pytest.raises(QueryError, match="No read-outs of the lens tuned are stored"):
        deep.query("lens_trajectory", {"doc": 0, "lens": "tuned"})


@pytest.mark.parametrize("feature", [0, 7, 31])
def test_features_that_write_nothing_and_saes_beside_the_stream_are_like_none(deep: Store, feature: int) -> None:
    found = deep.query("similar_features", {"sae": "stream", "feature": feature, "k": 100}).rows()
    assert {one["sae"] for one in found} == {"stream"}
    assert sorted(one["feature"] for one in found) == sorted({*range(32)} - {*SILENT, feature})
    assert all(-1.001 < one["cosine"] < 1.001 for one in found)


def test_an_sae_beside_the_stream_says_so(deep: Store) -> None:
    assert len(deep.query("similar_features", {"sae": "stream", "feature": SILENT[0]})) == 0
    for asked in ({"sae": BESIDE, "feature": 1}, {"sae": "stream", "feature": 1, "other": BESIDE}):
        with pytest.raises(InvalidInput, match=r"q\.3 is not on the way into the residual stream"):
            deep.query("similar_features", asked)


@ASKED
@given(data=st.data(), against=st.sampled_from([None, -1, 17]), k=st.integers(1, 40))
def test_any_logit_is_the_sum_of_its_parts(deep: Store, data: st.DataObject, against: int | None, k: int) -> None:
    """Every part by hand, from the arrays and the checkpoint's own weights; the k largest, largest first."""
    row, token = data.draw(st.integers(0, 100)), data.draw(st.integers(0, 1500))
    asked = {"row": row, "token_id": token, "k": k} | ({} if against is None else {"against_id": against})
    found = deep.query("direct_attribution", asked).rows()
    parts, stream, logit = parts_by_hand(Path(deep.url), row, token, against)
    assert found[0]["total"] == pytest.approx(stream, abs=1e-4)
    assert found[0]["logit"] == pytest.approx(logit, abs=1e-4)
    sizes = [abs(one["contribution"]) for one in found]
    np.testing.assert_allclose(sizes, np.sort(np.abs([*parts.values(), 0]))[::-1][:k], atol=1e-4)
    for one in found:
        if one["component"] != "rounding":
            place = (one["component"], one["layer"], one["head"])
            assert one["contribution"] == pytest.approx(parts[place], abs=1e-4), place


@cache
def checkpoint() -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in load_file(MODEL / "model.safetensors").items()}


def parts_by_hand(store: Path, row: int, token: int, against: int | None) -> tuple[dict[Any, float], float, float]:
    """Return the contributions by (component, layer, head), the logit (difference) before the cap, and after it."""
    group = zarr.open_group(store / "arrays", mode="r")
    weights = checkpoint()
    site = {name: np.asarray(group[f"sites/{name}"])[row].astype(np.float64) for name in group["sites"]}  # type: ignore[union-attr]
    unembedding, last = weights["model.embed_tokens.weight"], site["resid_post.5"]
    other = 0.0 if against is None else unembedding.mean(axis=0) if against == -1 else unembedding[against]
    scaled = (1 + weights["model.norm.weight"]) / np.sqrt((last**2).mean() + 1e-6)
    read = (unembedding[token] - other) * scaled
    parts: dict[Any, float] = {("embedding", None, None): site["resid_pre.0"] @ read}
    for layer in range(LAYERS):
        parts["mlp_out", layer, None] = site[f"mlp_out.{layer}"] @ read
        name = f"model.layers.{layer}"
        w_o = weights[f"{name}.self_attn.o_proj.weight"].T.reshape(4, -1, len(last))
        outs = np.einsum("hd,hdm->hm", site[f"z.{layer}"].reshape(4, -1), w_o)
        gain = 1 + weights[f"{name}.post_attention_layernorm.weight"]
        heads = outs / np.sqrt((outs.sum(axis=0) ** 2).mean() + 1e-6) * gain @ read
        parts |= {("head", layer, head): share for head, share in enumerate(heads.tolist())}
    return parts, float(last @ read), float(30 * np.tanh(last @ (unembedding[token] * scaled) / 30))


# Rows whose error is not known, as of all but the lowest layer of a cross-layer transcoder


def without_errors(known: str) -> str:
    """Return dark_matter over a `reconstruction` that knows the error only of some rows."""
    errors = f"CASE WHEN {known} THEN error_norm END AS error_norm"
    hidden = f"WITH known AS (SELECT sae, row, l0, norm, {errors} FROM reconstruction), "
    return hidden + named_query("dark_matter").sql.removeprefix("WITH ").replace("FROM reconstruction", "FROM known")


@pytest.mark.parametrize("by", ["row", "token", "document"])
def test_rows_without_an_error_are_not_the_darkest(opened: Store, truth: Truth, by: str) -> None:
    asked = {"sae": RES, "by": by, "min_rows": 1, "k": 5000}
    found = opened.sql(without_errors("row % 3 = 0"), asked).rows()
    assert sum(one["n_rows"] for one in found) == (truth.plain & (truth.rows % 3 == 0)).sum()
    assert all(one["unexplained"] is not None and one["row"] % 3 == 0 for one in found)
    with pytest.raises(QueryError, match="leaves unexplained is not known"):
        opened.sql(without_errors("false"), asked)


# What is refused, whatever else the store holds


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        pytest.param("coactivation", {"sae": RES, "feature": DEAD, "by": "luck"}, "accepted: jaccard, pmi", id="by"),
        pytest.param(
            "probe_direction", {"site": "resid_pre.0", "a_rows": [0], "b_rows": [512]}, "are the same", id="same means"
        ),
        pytest.param("direct_attribution", {"row": 5, "token": ".", "token_id": 3}, "not both", id="two tokens"),
        pytest.param("direct_attribution", {"row": 5, "against": ".", "against_id": 3}, "not both", id="two others"),
        pytest.param("direct_attribution", {"row": 5, "token_id": 1 << 40}, "There is no token 1099511", id="no token"),
    ],
)
def test_a_question_that_has_no_answer(opened: Store, name: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        opened.query(name, asked)


def test_a_feature_that_always_fires_is_likeliest_on_no_token(opened: Store) -> None:
    found = opened.query("feature_tokens", {"sae": RES, "feature": ALWAYS, "k": 5}).rows()
    assert [one["lift"] for one in found] == pytest.approx([1.0] * 5)
