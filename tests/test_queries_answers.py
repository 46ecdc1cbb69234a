"""Every named query, and the tables beneath them, against numpy over the stored arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from asking_support import ALWAYS, ATT, DEAD, LENS_SITES, RES, SmallStore, Truth, reference_model
from extraction_support import log_softmax, next_tokens

from actstore.api import Store
from actstore.errors import QueryError, UnknownName

DOCUMENTS = [0, 2, 3, 4, 6, 17]
FEATURES = [(RES, 9), (RES, ALWAYS), (RES, 200), (RES, DEAD), (ATT, 3), (ATT, ALWAYS)]


@pytest.fixture(scope="module")
def truth(small: SmallStore) -> Truth:
    return small.truth


def strongest(truth: Truth, sae: str, feature: int) -> list[tuple[float, int]]:
    """Return activation and row of a feature's plain firings, strongest first, ties by row."""
    fired = truth.plain_firings(sae, feature)
    order = np.lexsort((fired.row, -fired.activation))
    return [(float(fired.activation[i]), int(fired.row[i])) for i in order]


# Tables


def test_the_question_of_the_contract(opened: Store, truth: Truth) -> None:
    found = opened.sql(
        f"""
    SELECT t.token, snippet(a.row, 10, 10) AS example, a.activation
    FROM activations a JOIN tokens t USING (row)
    WHERE a.sae = '{RES}' AND a.feature = 9
    ORDER BY a.activation DESC LIMIT 20;
"""
    ).rows()
    fired = truth.firings(RES)
    mine = fired.feature == 9
    expected = np.sort(fired.activation[mine])[::-1][:20]
    assert [row["activation"] for row in found] == expected.tolist()
    by_activation: dict[float, set[tuple[str, str]]] = {}
    for row, activation in zip(fired.row[mine].tolist(), fired.activation[mine].tolist(), strict=True):
        token = truth.vocabulary[truth.field("token_id")[truth.place[row]]]
        by_activation.setdefault(activation, set()).add((token, truth.snippet(row, 10, 10)))
    for row in found:
        assert (row["token"], row["example"]) in by_activation[row["activation"]]


@pytest.mark.parametrize("sae", [RES, ATT])
def test_activations_are_every_firing(opened: Store, truth: Truth, sae: str) -> None:
    found = opened.sql(f"SELECT * FROM activations WHERE sae = '{sae}' ORDER BY row, feature").numpy()
    expected = truth.firings(sae)
    for name in ("row", "feature", "activation"):
        np.testing.assert_array_equal(found[name], getattr(expected, name))


@pytest.mark.parametrize("sae", [RES, ATT])
def test_features_are_statistics_of_plain_rows(opened: Store, truth: Truth, small: SmallStore, sae: str) -> None:
    table = opened.sql(f"SELECT * FROM features WHERE sae = '{sae}' ORDER BY feature").rows()
    assert [row["feature"] for row in table] == list(range(len(small.saes[sae]["threshold"])))
    for row in table:
        values = np.sort(truth.plain_firings(sae, row["feature"]).activation)
        n_firings = len(values)
        assert row["n_firings"] == n_firings
        assert row["density"] == pytest.approx(n_firings / truth.plain.sum())
        assert row["label"] is None
        if not n_firings:
            assert (row["max_activation"], row["mean_activation"], sum(row["histogram"])) == (0, 0, 0)
            continue
        exact = values.astype(np.float64)
        assert row["max_activation"] == values[-1]
        assert row["mean_activation"] == pytest.approx(exact.mean())
        assert row["std_activation"] == pytest.approx(exact.std(), abs=1e-9)
        for name, share in (("p50", 50), ("p90", 90), ("p99", 99)):
            assert row[name] == values[-(-n_firings * share // 100) - 1]
        assert sum(row["histogram"]) == n_firings
    assert table[DEAD]["n_firings"] == 0 < table[ALWAYS]["n_firings"] == truth.plain.sum()


@pytest.mark.parametrize(("sae", "feature"), FEATURES)
def test_examples_are_the_hundred_strongest(opened: Store, truth: Truth, sae: str, feature: int) -> None:
    found = opened.sql(
        "SELECT rank, row, activation FROM examples WHERE sae = $sae AND feature = $feature ORDER BY rank",
        {"sae": sae, "feature": feature},
    ).rows()
    expected = strongest(truth, sae, feature)[:100]
    assert [(one["activation"], one["row"]) for one in found] == expected
    assert [one["rank"] for one in found] == list(range(1, len(expected) + 1))


def test_reconstruction_and_feature_logits_are_the_stored_arrays(opened: Store, truth: Truth) -> None:
    found = opened.sql(f"SELECT * FROM reconstruction WHERE sae = '{ATT}' ORDER BY row").numpy()
    np.testing.assert_array_equal(found["row"], truth.rows)
    for place, name in enumerate(("l0", "norm", "error_norm")):
        np.testing.assert_array_equal(found[name], truth.matrix(f"reconstruction/{ATT}")[:, place])
    stored = truth.reader.feature_logits(ATT)
    assert stored is not None
    logits = opened.sql(f"SELECT * FROM feature_logits WHERE sae = '{ATT}' ORDER BY feature, rank").numpy()
    assert sorted(logits["logit"].tolist()) == sorted(stored[1].reshape(-1).tolist())
    top = opened.sql(
        f"SELECT token_id FROM feature_logits WHERE sae = '{ATT}' AND feature = 4 ORDER BY logit DESC"
    ).numpy()
    assert top["token_id"][0] == stored[0][4, 0]


# max_activating


def examples_of(
    truth: Truth, sae: str, feature: int, k: int, per_document: int, before: int, after: int
) -> list[dict[str, Any]]:
    """Return what the query should say, firing after firing."""
    fired = strongest(truth, sae, feature)
    docs = [int(truth.doc[truth.place[row]]) for _, row in fired]
    seen: dict[int, int] = {}
    rows: list[dict[str, Any]] = []
    for (activation, row), doc in zip(fired, docs, strict=True):
        seen[doc] = seen.get(doc, 0) + 1
        if (per_document and seen[doc] > per_document) or len(rows) == k:
            continue
        place = truth.place[row]
        rows.append(
            {
                "activation": activation,
                "token": truth.vocabulary[truth.field("token_id")[place]],
                "example": truth.snippet(row, before, after),
                "doc": doc,
                "pos": int(truth.field("pos")[place]),
                "row": row,
                "n_merged": docs.count(doc) if per_document else None,
            }
        )
    return rows


@pytest.mark.parametrize(("sae", "feature"), FEATURES)
@pytest.mark.parametrize(
    ("k", "per_document"),
    [
        pytest.param(20, 0, id="from the examples"),
        pytest.param(100, 0, id="all examples"),
        pytest.param(101, 0, id="one more than there are examples"),
        pytest.param(5000, 0, id="all firings"),
        pytest.param(7, 1, id="one of a document"),
        pytest.param(300, 3, id="three of a document"),
    ],
)
def test_max_activating(opened: Store, truth: Truth, sae: str, feature: int, k: int, per_document: int) -> None:
    given = {"sae": sae, "feature": feature, "k": k, "per_document": per_document, "before": 4, "after": 2}
    assert opened.query("max_activating", given).rows() == examples_of(truth, sae, feature, k, per_document, 4, 2)


def test_ties_are_there_and_go_by_row(opened: Store, truth: Truth) -> None:
    activations = [activation for activation, _ in strongest(truth, RES, 9)[:20]]
    assert len(set(activations)) < len(activations)
    rows = opened.query("max_activating", {"sae": RES, "feature": 9}).rows()
    assert rows == sorted(rows, key=lambda row: (-row["activation"], row["row"]))


# Features of an SAE, a token, a document


def test_feature_stats(opened: Store, truth: Truth) -> None:
    rows = opened.query("feature_stats", {"sae": RES, "k": 10}).rows()
    counts = np.bincount(truth.plain_firings(RES).feature, minlength=256)
    assert [row["feature"] for row in rows] == np.lexsort((np.arange(256), -counts))[:10].tolist()
    assert {row["n_dead"] for row in rows} == {int((counts == 0).sum())}
    assert {row["n_features"] for row in rows} == {256}
    (one,) = opened.query("feature_stats", {"sae": RES, "feature": 9}).rows()
    assert one["n_firings"] == counts[9]


@pytest.mark.parametrize("place", [0, 1, 57, 800, -1])
def test_token_features(opened: Store, truth: Truth, place: int) -> None:
    row = int(truth.rows[place])
    found = opened.query("token_features", {"sae": RES, "row": row, "k": 500}).rows()
    fired, plain = truth.firings(RES), truth.plain_firings(RES)
    here = np.flatnonzero(fired.row == row)
    here = here[np.lexsort((fired.feature[here], -fired.activation[here]))]
    assert [(one["feature"], one["activation"]) for one in found] == [
        (int(fired.feature[i]), float(fired.activation[i])) for i in here
    ]
    for one in found:
        strengths = plain.activation[plain.feature == one["feature"]]
        assert one["density"] == pytest.approx(len(strengths) / truth.plain.sum())
        assert one["share"] == pytest.approx(one["activation"] / strengths.max())


@pytest.mark.parametrize("doc", DOCUMENTS)
@pytest.mark.parametrize("sae", [RES, ATT])
def test_document_features(opened: Store, truth: Truth, sae: str, doc: int) -> None:
    found = opened.query("document_features", {"doc": doc, "sae": sae, "k": 12}).rows()
    plain = truth.plain_firings(sae)
    of_document = truth.doc[truth.places(plain.row)] == doc
    n_rows = int((truth.plain & (truth.doc == doc)).sum())
    scored = []
    for feature in np.unique(plain.feature[of_document]):
        mine = (plain.feature == feature) & of_document
        density = (plain.feature == feature).sum() / truth.plain.sum()
        lift = mine.sum() / n_rows / density
        scored.append((-mine.sum() * np.log(lift), int(feature), int(mine.sum()), lift, plain.activation[mine].max()))
    scored.sort(key=lambda one: (round(one[0], 9), one[1]))
    expected = scored[:12]
    np.testing.assert_allclose([-one["n_rows"] * np.log(one["lift"]) for one in found], [one[0] for one in expected])
    for one in found:
        (same,) = (other for other in scored if other[1] == one["feature"])
        assert (one["n_rows"], one["max_activation"]) == (same[2], same[4])
        assert one["lift"] == pytest.approx(same[3])
        assert "«" in one["strongest"]


# Predictions and lenses


@pytest.mark.parametrize("doc", [None, *DOCUMENTS])
def test_surprising_tokens(opened: Store, truth: Truth, doc: int | None) -> None:
    found = opened.query("surprising_tokens", {"doc": doc, "k": 40}).rows()
    logprob = truth.matrix("predictions/values")[:, 0]
    targets = next_tokens(truth)
    # The token that came stands on the next row: its flags count, not those of the row that predicts it.
    came = np.flatnonzero((targets >= 0) & np.append(truth.plain[1:], False))
    came = came[truth.doc[came] == doc] if doc is not None else came
    order = came[np.lexsort((truth.rows[came], logprob[came]))][:40]
    assert [row["row"] for row in found] == (truth.rows[order] + 1).tolist()
    for row, place in zip(found, order, strict=True):
        assert row["surprise"] == -logprob[place]
        assert row["token"] == truth.vocabulary[targets[place]]
        assert row["expected"] == truth.vocabulary[truth.matrix("predictions/ids")[place, 1]]
        assert row["example"] == truth.snippet(row["row"], 12, 3)
        assert (row["doc"], row["pos"]) == (truth.doc[place + 1], truth.field("pos")[place + 1])


def test_no_surprise_is_lost_at_the_edge_of_a_window(opened: Store, truth: Truth) -> None:
    """Every plain token that follows another is there once, those after a repeated token among them."""
    rows = [row["row"] for row in opened.query("surprising_tokens", {"k": 100_000}, limit=100_000).rows()]
    expected = truth.rows[truth.plain & (truth.field("pos") > 0)]
    assert sorted(rows) == expected.tolist()


@pytest.mark.parametrize("doc", DOCUMENTS)
def test_lens_trajectory(opened: Store, truth: Truth, doc: int) -> None:
    found = opened.query("lens_trajectory", {"doc": doc}).rows()
    places = np.flatnonzero(truth.doc == doc)
    values = {site: truth.matrix(f"lens/logit/{site}/values") for site in LENS_SITES}
    ids = {site: truth.matrix(f"lens/logit/{site}/ids") for site in LENS_SITES}
    top1 = truth.matrix("predictions/ids")[:, 1]
    expected = []
    for place in places:
        right = [ids[site][place, 1] == top1[place] for site in LENS_SITES]
        leads_from = next((layer for layer in range(6) if all(right[layer:])), None)
        for layer, site in enumerate(LENS_SITES):
            rank = int(ids[site][place, 0])
            expected.append(
                (
                    int(truth.rows[place]),
                    site,
                    layer,
                    truth.vocabulary[truth.field("token_id")[place]],
                    truth.vocabulary[top1[place]],
                    truth.vocabulary[ids[site][place, 1]],
                    None if rank < 0 else rank,
                    float(values[site][place, 1]),
                    float(values[site][place, 2]),
                    leads_from,
                )
            )
    names = ("row", "site", "layer", "input", "final_token", "top_token", "target_rank")
    columns = (*names, "entropy", "kl_to_final", "leads_from")
    assert [tuple(row[name] for name in columns) for row in found] == expected
    for row in found:
        logprob = values[row["site"]][truth.place[row["row"]], 0]
        assert (
            row["target_probability"] is None
            if np.isnan(logprob)
            else row["target_probability"] == pytest.approx(float(np.exp(logprob)), rel=1e-5)
        )


def logit_lens_of(truth: Truth, site: str, places: np.ndarray) -> np.ndarray:
    """Return log-probabilities (row, token) by numpy: norm, unembedding, cap of 30."""
    model = reference_model()
    gain = 1 + model.model.norm.weight.detach().double().numpy()
    rows = truth.matrix(f"sites/{site}")[places].astype(np.float64)
    normed = rows / np.sqrt((rows**2).mean(1, keepdims=True) + 1e-6) * gain
    return log_softmax(30 * np.tanh(normed @ model.lm_head.weight.detach().double().numpy().T / 30))


@pytest.mark.parametrize(("doc", "k"), [(0, 1), (3, 4), (6, 2)])
def test_logit_lens(opened: Store, truth: Truth, doc: int, k: int) -> None:
    found = opened.query("logit_lens", {"doc": doc, "k": k}).rows()
    places = np.flatnonzero(truth.doc == doc)
    sites = {"resid_pre.0", "resid_mid.3", *LENS_SITES}
    assert {row["site"] for row in found} == sites
    assert len(found) == len(sites) * len(places) * k
    for site in sites:
        logprobs = logit_lens_of(truth, site, places)
        mine = [row for row in found if row["site"] == site]
        for row, rank in zip(mine, [rank for _ in places for rank in range(k)], strict=True):
            at = int(np.flatnonzero(truth.rows[places] == row["row"])[0])
            assert row["rank"] == rank + 1
            assert row["logprob"] == pytest.approx(-np.sort(-logprobs[at])[rank], abs=2e-4)
            assert logprobs[at, row["token_id"]] == pytest.approx(row["logprob"], abs=2e-4)
            assert row["token"] == truth.vocabulary[row["token_id"]]
            assert row["input"] == truth.vocabulary[truth.field("token_id")[places[at]]]
            assert row["pos"] == truth.field("pos")[places[at]]


def test_logit_lens_takes_the_sites_that_are_asked_for(opened: Store) -> None:
    rows = opened.query("logit_lens", {"doc": 3, "sites": "resid_post.[03]"}).rows()
    assert {row["site"] for row in rows} == {"resid_post.0", "resid_post.3"}


# What a query is told


@pytest.mark.parametrize(
    ("name", "given", "kind", "message"),
    [
        ("max_activations", {}, UnknownName, "Did you mean 'max_activating'"),
        ("max_activating", {"sae": RES}, QueryError, "needs feature"),
        ("max_activating", {"sae": RES, "feature": "nine"}, QueryError, "'feature' is 'nine'"),
        ("max_activating", {"sae": RES, "feature": 1.5}, QueryError, "'feature' is 1.5"),
        ("max_activating", {"sae": RES, "feature": True}, QueryError, "'feature' is True"),
        ("max_activating", {"sae": RES, "feature": 1, "kk": 3}, QueryError, "Did you mean 'k'"),
        ("max_activating", {"sae": "3-tiny-scope-res", "feature": 1}, UnknownName, RES),
        ("logit_lens", {"doc": 10_000}, UnknownName, "documents 0 to"),
        ("logit_lens", {"doc": -1}, UnknownName, "There is no document -1"),
        ("token_features", {"sae": RES, "row": 1 << 40}, UnknownName, "There is no row"),
        ("token_features", {"sae": RES, "row": -1}, UnknownName, "There is no row -1"),
        ("logit_lens", {"doc": 3, "k": 0}, QueryError, "'k' is 0. Accepted: count from 1 to 1000000: "),
        ("direct_attribution", {"row": 1, "k": -1}, QueryError, "'k' is -1. Accepted: count from 1 to 1000000: "),
        ("direct_attribution", {"row": 1 << 70}, UnknownName, "There is no row"),
        ("max_activating", {"sae": RES, "feature": 1, "before": -1}, QueryError, "Accepted: amount from 0 to"),
        ("feature_stats", {"sae": RES, "k": (1 << 63) - 1}, QueryError, "count from 1 to 1000000"),
        ("max_activating", {"sae": RES, "feature": 1, "before": 1 << 31}, QueryError, "amount from 0 to 1000000"),
        ("dead_features", {"sae": RES, "most": -1}, QueryError, "Accepted: amount from 0 to 1000000: "),
        (
            "max_activating",
            {"sae": RES, "feature": 256},
            UnknownName,
            f"There is no feature 256 of {RES}. Accepted: 0 to 255",
        ),
        ("max_activating", {"sae": RES, "feature": -1}, UnknownName, "There is no feature -1"),
        ("feature_stats", {"sae": RES, "feature": 1 << 70}, UnknownName, "There is no feature"),
    ],
)
def test_a_wrong_question_is_an_error_that_helps(
    opened: Store, name: str, given: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        opened.query(name, given)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["*", "a*", "$.", "$[", "$.*", '$."*"', "$..a", "$a", "$.a[*]"])
def test_a_key_that_would_end_the_database_is_refused(opened: Store, key: str) -> None:
    with pytest.raises(QueryError, match="'docs' is"):
        opened.query("token_expression", {"sae": RES, "docs": {key: 1}})
    assert opened.query("contents").rows()
