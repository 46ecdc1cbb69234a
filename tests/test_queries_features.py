"""Queries about features, against numpy over a dense matrix of the stored firings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from asking_support import ALWAYS, ATT, DEAD, RES, SmallStore, Truth, reference_model
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from queries_support import Dense, assert_ranked

from actstore.api import Store
from actstore.errors import QueryError, UnknownName

WIDTHS = {RES: 256, ATT: 96}
FEATURES = [(RES, 9), (RES, ALWAYS), (RES, 200), (RES, DEAD), (ATT, 3), (ATT, ALWAYS)]
TOKENS = [" the", ".", ",", " a", " is", " in", ":"]
ASKED = settings(  # each asks the store, so shrinking would take minutes
    max_examples=30,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def truth(small: SmallStore) -> Truth:
    return small.truth


@pytest.fixture(scope="module")
def dense(truth: Truth) -> dict[str, Dense]:
    return {sae: Dense(truth, sae, width) for sae, width in WIDTHS.items()}


# Across the activation range


@pytest.mark.parametrize(("sae", "feature"), FEATURES)
@pytest.mark.parametrize(("intervals", "k"), [(10, 5), (1, 7), (4, 1), (37, 1000)])
def test_examples_by_interval(
    opened: Store, truth: Truth, dense: dict[str, Dense], sae: str, feature: int, intervals: int, k: int
) -> None:
    given_ = {"sae": sae, "feature": feature, "intervals": intervals, "k": k, "before": 3, "after": 2}
    found = opened.query("examples_by_interval", given_).rows()
    values, rows = dense[sae].plain[:, feature], truth.rows[truth.plain]
    width = values.max() / intervals
    bins = np.minimum(np.floor(values / (values.max() or 1) * intervals), intervals - 1)
    expected = []
    for interval in reversed(range(intervals)):
        inside = np.flatnonzero((values > 0) & (bins == interval))
        inside = inside[np.lexsort((rows[inside], -values[inside]))]
        steps = np.unique(np.ceil(np.arange(min(k, len(inside))) * len(inside) / min(k, len(inside) or 1)).astype(int))
        expected += [(int(rows[i]), values[i], len(inside), interval * width) for i in inside[steps]]
    assert [(one["row"], one["activation"], one["n_firings"]) for one in found] == [one[:3] for one in expected]
    np.testing.assert_allclose([one["low"] for one in found], [one[3] for one in expected])
    np.testing.assert_allclose([one["high"] - one["low"] for one in found], np.full(len(found), width))
    for one in found:
        assert one["low"] <= one["activation"] * (1 + 1e-9) and one["activation"] <= one["high"] * (1 + 1e-9)
        assert one["share"] == pytest.approx(one["n_firings"] / (values > 0).sum())
        assert one["example"] == truth.snippet(one["row"], 3, 2)
        assert one["doc"] == truth.doc[truth.place[one["row"]]]


@pytest.mark.parametrize(("sae", "feature"), FEATURES)
def test_activation_histogram(opened: Store, dense: dict[str, Dense], sae: str, feature: int) -> None:
    found = opened.query("activation_histogram", {"sae": sae, "feature": feature}).numpy()
    values = dense[sae].plain[:, feature]
    values = values[values > 0]
    edges = np.linspace(0, values.max(initial=0), 21)
    np.testing.assert_allclose(found["low"], edges[:-1])
    np.testing.assert_allclose(found["high"], edges[1:])
    inside = [
        ((values / values.max() * 20).astype(int).clip(max=19) == b).sum() if len(values) else 0 for b in range(20)
    ]
    assert found["n_firings"].tolist() == inside
    assert found["n_firings"].sum() == len(values)
    if len(values):
        np.testing.assert_allclose(found["share"], found["n_firings"] / len(values))


@pytest.mark.parametrize("sae", [RES, ATT])
@pytest.mark.parametrize("most", [0, 30, 100])
def test_dead_features(opened: Store, dense: dict[str, Dense], sae: str, most: int) -> None:
    found = opened.query("dead_features", {"sae": sae, "most": most}).rows()
    counts = (dense[sae].plain > 0).sum(axis=0)
    few = np.flatnonzero(counts <= most)
    assert [one["feature"] for one in found] == few[np.lexsort((few, counts[few]))].tolist()
    assert [one["n_firings"] for one in found] == sorted(counts[few].tolist())
    assert {(one["n_dead"], one["n_features"]) for one in found} == {(int((counts == 0).sum()), WIDTHS[sae])}


# Tokens and features


@pytest.mark.parametrize(("sae", "feature"), FEATURES)
@pytest.mark.parametrize("k", [5, 2000])
def test_feature_tokens(opened: Store, truth: Truth, dense: dict[str, Dense], sae: str, feature: int, k: int) -> None:
    found = opened.query("feature_tokens", {"sae": sae, "feature": feature, "k": k}).rows()
    values, ids, rows = dense[sae].plain[:, feature], truth.field("token_id")[truth.plain], truth.rows[truth.plain]
    expected: dict[int, dict[str, Any]] = {}
    for token_id in np.unique(ids[values > 0]).tolist():
        mine = values[ids == token_id]
        fired = mine[mine > 0]
        lift = len(fired) / len(mine) / (values > 0).mean()
        strongest = int(rows[ids == token_id][mine.argmax()])
        expected[token_id] = {
            "n_firings": len(fired),
            "n_tokens": len(mine),
            "share": len(fired) / len(mine),
            "lift": lift,
            "mean_activation": fired.mean(),
            "max_activation": fired.max(),
            "row": strongest,
            "token": truth.vocabulary[token_id],
            "example": truth.snippet(strongest, 5, 3),
            "score": len(fired) * np.log(lift),
        }
    assert_ranked(found, expected, "score", k, key="token_id")


def expected_features(dense: Dense, here: np.ndarray, there: np.ndarray | None) -> dict[int, dict[str, float]]:
    """Return what features_for_tokens should say of rows (by place) here and there; None: all plain rows."""
    in_, out = dense.values[here], dense.plain if there is None else dense.values[there]
    expected = {}
    for feature in np.flatnonzero((in_ > 0).any(axis=0)).tolist():
        a, b = in_[:, feature], out[:, feature]
        expected[feature] = {
            "rate_here": (a > 0).mean(),
            "rate_there": (b > 0).mean(),
            "mean_here": a.mean(),
            "mean_there": b.mean(),
            "n_here": len(a),
            "n_there": len(b),
            "density": dense.density[feature],
            "difference": (a > 0).mean() - (b > 0).mean(),
        }
    return expected


@ASKED
@given(data=st.data(), sae=st.sampled_from([RES, ATT]), k=st.integers(1, 300), contrasted=st.booleans())
def test_features_for_rows(
    opened: Store, truth: Truth, dense: dict[str, Dense], data: st.DataObject, sae: str, k: int, contrasted: bool
) -> None:
    places = data.draw(st.lists(st.integers(0, len(truth.rows) - 1), min_size=2, max_size=40, unique=True))
    cut = data.draw(st.integers(1, len(places) - 1)) if contrasted else len(places)
    here, there = np.array(places[:cut]), np.array(places[cut:], int)
    asked = {"sae": sae, "rows": truth.rows[here].tolist(), "k": k}
    asked |= {"not_rows": truth.rows[there].tolist()} if contrasted else {}
    found = opened.query("features_for_tokens", asked).rows()
    expected = expected_features(dense[sae], here, there if contrasted else None)
    assert_ranked(found, expected, "difference", k, "mean_here")


@pytest.mark.parametrize("sae", [RES, ATT])
@pytest.mark.parametrize(
    ("tokens", "not_tokens"), [([" the"], None), ([" the", "."], [","]), ([" is"], [" in", " a"]), ([":"], [" the"])]
)
def test_features_for_tokens(
    opened: Store, dense: dict[str, Dense], sae: str, tokens: list[str], not_tokens: list[str] | None
) -> None:
    spelled = {"tokens": "|".join(tokens)} | ({"not_tokens": "|".join(not_tokens)} if not_tokens else {})
    found = opened.query("features_for_tokens", {"sae": sae, "k": 50, **spelled}).rows()
    here = dense[sae].places_of_tokens(tokens)
    there = dense[sae].places_of_tokens(not_tokens) if not_tokens else None
    assert_ranked(found, expected_features(dense[sae], here, there), "difference", 50, "mean_here")


def test_of_many_rows_some_are_taken_evenly(opened: Store, dense: dict[str, Dense]) -> None:
    found = opened.query("features_for_tokens", {"sae": RES, "tokens": " the", "most": 7, "k": 300}).rows()
    here = dense[RES].places_of_tokens([" the"])
    assert len(here) > 20
    taken = here[np.ceil(np.arange(7) * len(here) / 7).astype(int)]
    assert_ranked(found, expected_features(dense[RES], taken, None), "difference", 300, "mean_here")


# Features and features


@pytest.mark.parametrize(("sae", "feature"), FEATURES)
@pytest.mark.parametrize(("other", "by", "min_both"), [(None, "jaccard", 1), (RES, "pmi", 3), (ATT, "jaccard", 10)])
def test_coactivation(
    opened: Store, dense: dict[str, Dense], sae: str, feature: int, other: str | None, by: str, min_both: int
) -> None:
    asked = {"sae": sae, "feature": feature, "other": other, "by": by, "min_both": min_both, "k": 40}
    found = opened.query("coactivation", asked).rows()
    own, partners = dense[sae].plain[:, feature] > 0, dense[other or sae].plain > 0
    both = partners[own].sum(axis=0)
    expected = {}
    for partner in np.flatnonzero(both >= min_both).tolist():
        if (other or sae) == sae and partner == feature:
            continue
        theirs = partners[:, partner]
        expected[partner] = {
            "n_both": both[partner],
            "n_firings": theirs.sum(),
            "jaccard": both[partner] / (own | theirs).sum(),
            "pmi": np.log((own & theirs).mean() / own.mean() / theirs.mean()),
            "density": theirs.mean(),
        }
    assert_ranked(found, expected, by, 40, "n_both")
    assert {one["sae"] for one in found} <= {other or sae}


@pytest.fixture(scope="module")
def directions(small: SmallStore) -> dict[str, np.ndarray]:
    """What features write into the residual stream: (feature, d_model)."""
    layer = reference_model().model.layers[2]
    w_o = layer.self_attn.o_proj.weight.detach().double().numpy()
    gain = 1 + layer.post_attention_layernorm.weight.detach().double().numpy()
    decoders = {sae: small.saes[sae]["W_dec"].astype(np.float64) for sae in WIDTHS}
    return {RES: decoders[RES], ATT: decoders[ATT] @ w_o.T * gain}


@pytest.mark.parametrize(("sae", "feature"), FEATURES)
@pytest.mark.parametrize(("other", "k"), [(None, 5), (ATT, 300), (RES, 1)])
def test_similar_features(
    opened: Store, directions: dict[str, np.ndarray], sae: str, feature: int, other: str | None, k: int
) -> None:
    found = opened.query("similar_features", {"sae": sae, "feature": feature, "other": other, "k": k}).rows()
    unit = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in directions.items()}
    names = [other] if other else [ATT, RES]  # by layer
    assert list(dict.fromkeys(one["sae"] for one in found)) == names
    for name in names:
        cosines = unit[name] @ unit[sae][feature]
        rest = [partner for partner in range(WIDTHS[name]) if (name, partner) != (sae, feature)]
        mine = [one for one in found if one["sae"] == name]
        np.testing.assert_allclose([one["cosine"] for one in mine], np.sort(cosines[rest])[::-1][:k], atol=2e-6)
        np.testing.assert_allclose(
            [one["cosine"] for one in mine], cosines[[one["feature"] for one in mine]], atol=2e-6
        )
        assert (name, feature) not in {(one["sae"], one["feature"]) for one in mine} or name != sae


@pytest.mark.parametrize(("sae", "feature"), FEATURES)
@pytest.mark.parametrize("k", [3, 10])
def test_feature_logits(
    opened: Store, truth: Truth, directions: dict[str, np.ndarray], sae: str, feature: int, k: int
) -> None:
    found = opened.query("feature_logits", {"sae": sae, "feature": feature, "k": k}).rows()
    model = reference_model()
    gain = 1 + model.model.norm.weight.detach().double().numpy()
    logits = model.lm_head.weight.detach().double().numpy() @ (directions[sae][feature] * gain)
    logits -= logits.mean()
    ordered = np.sort(logits)[::-1]
    assert [one["rank"] for one in found] == [*range(1, k + 1), *range(-k, 0)]
    np.testing.assert_allclose([one["logit"] for one in found], [*ordered[:k], *ordered[-k:]], atol=1e-4)
    np.testing.assert_allclose([one["logit"] for one in found], logits[[one["token_id"] for one in found]], atol=1e-4)
    assert [one["token"] for one in found] == [truth.vocabulary[one["token_id"]] for one in found]


# What is refused


@pytest.mark.parametrize(
    ("name", "asked", "kind", "message"),
    [
        pytest.param("features_for_tokens", {"sae": RES}, QueryError, "Give rows or tokens", id="nothing given"),
        pytest.param(
            "features_for_tokens",
            {"sae": RES, "rows": "5-9", "not_rows": [9]},
            QueryError,
            "Row 9 is on both",
            id="both",
        ),
        pytest.param(
            "features_for_tokens",
            {"sae": RES, "tokens": "no token"},
            UnknownName,
            "No single token",
            id="several tokens",
        ),
        pytest.param(
            "features_for_tokens", {"sae": RES, "tokens": "<unk>"}, QueryError, "given as tokens", id="never there"
        ),
        pytest.param(
            "features_for_tokens",
            {"sae": RES, "tokens": ".", "not_tokens": "<unk>"},
            QueryError,
            "given as not_tokens",
            id="contrast never there",
        ),
        pytest.param(
            "features_for_tokens", {"sae": RES, "rows": [10**9]}, UnknownName, "There is no row 1000000000", id="no row"
        ),
        pytest.param(
            "coactivation", {"sae": RES, "feature": 1, "by": "luck"}, QueryError, "accepted: jaccard, pmi", id="order"
        ),
        pytest.param("coactivation", {"sae": RES, "feature": 256}, UnknownName, "Accepted: 0 to 255", id="no feature"),
        pytest.param("similar_features", {"sae": RES, "feature": 1, "other": "x"}, UnknownName, ATT, id="no other SAE"),
        pytest.param("feature_tokens", {"sae": RES, "feature": 1, "k": 0}, QueryError, "count from 1", id="k of zero"),
        pytest.param("dead_features", {"sae": "res"}, UnknownName, RES, id="no SAE"),
    ],
)
def test_a_wrong_question_is_an_error_that_helps(
    opened: Store, name: str, asked: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        opened.query(name, asked)
    assert message in str(caught.value)
