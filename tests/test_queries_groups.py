"""Queries about groups of documents or rows: conditions, expression, comparisons, directions; against SciPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from asking_support import ALWAYS, ATT, MODEL, RES, SmallStore, Truth
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from queries_support import Dense

import actstore
from actstore.api import Store
from actstore.errors import QueryError, UnknownName

WIDTHS = {RES: 256, ATT: 96}
N_DOCUMENTS, EMPTY = 45, 1
ASKED = settings(  # each asks the store, so shrinking would take minutes
    max_examples=20,
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


# Conditions


@pytest.mark.parametrize(
    ("condition", "fits"),
    [
        pytest.param("3", lambda doc, one: doc == 3, id="one document"),
        pytest.param("0-2, 5,40-60", lambda doc, one: doc <= 2 or doc == 5 or doc >= 40, id="ranges"),
        pytest.param([7, 3], lambda doc, one: doc in (3, 7), id="numbers"),
        pytest.param(3, lambda doc, one: doc == 3, id="a number"),
        pytest.param("kind=list", lambda doc, one: one.get("kind") == "list", id="metadata"),
        pytest.param(
            "kind = list & length=short",
            lambda doc, one: one.get("kind") == "list" and one.get("length") == "short",
            id="two conditions",
        ),
        pytest.param("items=3", lambda doc, one: one.get("items") == 3, id="a number of the metadata"),
        pytest.param({"items": 3}, lambda doc, one: one.get("items") == 3, id="a mapping"),
        pytest.param({"doc": [4, 5, 6], "kind": "list"}, lambda doc, one: doc in (4, 5, 6) and one["kind"] == "list"),
        pytest.param("$.kind=list", lambda doc, one: one.get("kind") == "list", id="a JSON path"),
        pytest.param("$.fact[1]=85", lambda doc, one: one.get("fact", [0, 0])[1:2] == [85], id="an element"),
        pytest.param("text=%list%", lambda doc, one: "list" in one["text"], id="a pattern"),
        pytest.param("text=A%", lambda doc, one: one["text"].startswith("A"), id="a pattern from the start"),
        pytest.param(
            "doc=0-20 & text=%list% & kind=list",
            lambda doc, one: doc <= 20 and "list" in one["text"] and one["kind"] == "list",
            id="all kinds",
        ),
    ],
)
def test_documents_are_those_that_fit(opened: Store, small: SmallStore, condition: Any, fits: Any) -> None:
    found = opened.query("feature_expression", {"sae": RES, "docs": condition, "features": [ALWAYS]}).rows()
    wanted = [doc for doc, one in enumerate(small.documents) if doc != EMPTY and fits(doc, one)]
    assert 0 < len(wanted) < N_DOCUMENTS - 1
    assert [one["doc"] for one in found] == wanted


@pytest.mark.parametrize("value", ["' OR 1=1 --", 'a"b', "$1", "%", "\\", "{'x'}", "日本"])
def test_a_value_is_never_part_of_the_statement(opened: Store, value: str) -> None:
    for condition in (f"kind={value}", f"{value}=list", {"text": f"{value}?no"}):
        with pytest.raises(QueryError):  # no document fits, or the path is none
            opened.query("token_expression", {"sae": RES, "docs": condition})


# Expression


@pytest.mark.parametrize("measure", ["mean", "max", "share"])
@pytest.mark.parametrize(("sae", "docs"), [(RES, None), (RES, "0-12"), (ATT, "kind=list")])
def test_feature_expression(
    opened: Store, truth: Truth, small: SmallStore, dense: dict[str, Dense], sae: str, docs: str | None, measure: str
) -> None:
    asked = {"sae": sae, "docs": docs, "measure": measure, "k": 12}
    found = opened.query("feature_expression", asked).numpy()
    kept = {None: range(N_DOCUMENTS), "0-12": range(13)}.get(
        docs, [doc for doc, one in enumerate(small.documents) if one.get("kind") == "list"]
    )
    rows = {doc: dense[sae].values[truth.plain & (truth.doc == doc)] for doc in kept if doc != EMPTY}
    reduced = {
        "mean": [values.mean(axis=0) for values in rows.values()],
        "max": [values.max(axis=0) for values in rows.values()],
        "share": [(values > 0).mean(axis=0) for values in rows.values()],
    }
    matrix = np.array(reduced[measure])
    variances = matrix.var(axis=0)
    features = np.unique(found["feature"])
    np.testing.assert_allclose(np.sort(variances[features]), np.sort(variances)[-12:], rtol=1e-9)
    assert found["doc"].tolist() == np.repeat(list(rows), 12).tolist()
    assert found["feature"].tolist() == np.tile(features, len(rows)).tolist()
    np.testing.assert_allclose(found["activation"], matrix[:, features].reshape(-1), rtol=1e-12)


def test_feature_expression_of_given_features(opened: Store, dense: dict[str, Dense]) -> None:
    found = opened.query("feature_expression", {"sae": RES, "docs": "3-9", "features": "200,5,9-11"}).rows()
    docs, means = dense[RES].documents(range(3, 10))
    features = [5, 9, 10, 11, 200]
    assert [(one["doc"], one["feature"]) for one in found] == [(doc, feature) for doc in docs for feature in features]
    np.testing.assert_allclose([one["activation"] for one in found], means[:, features].reshape(-1), rtol=1e-12)


@pytest.mark.parametrize(("sae", "docs", "features"), [(RES, 6, None), (ATT, "3,9", None), (RES, "2-4", [3, ALWAYS])])
def test_token_expression(
    opened: Store, truth: Truth, dense: dict[str, Dense], sae: str, docs: Any, features: list[int] | None
) -> None:
    found = opened.query("token_expression", {"sae": sae, "docs": docs, "features": features, "k": 9}).numpy()
    wanted = {6: [6], "3,9": [3, 9], "2-4": [2, 3, 4]}[docs]
    places = np.flatnonzero(truth.plain & np.isin(truth.doc, wanted))
    values = dense[sae].values[places]
    shown = np.unique(found["feature"])
    sums = values.sum(axis=0)
    if features is None:
        np.testing.assert_allclose(np.sort(sums[shown]), np.sort(sums)[-9:])
    else:
        assert shown.tolist() == features
    assert found["row"].tolist() == np.repeat(truth.rows[places], len(shown)).tolist()
    assert found["pos"].tolist() == np.repeat(truth.field("pos")[places], len(shown)).tolist()
    assert found["doc"].tolist() == np.repeat(truth.doc[places], len(shown)).tolist()
    np.testing.assert_array_equal(found["activation"], values[:, shown].reshape(-1))


# Comparisons


def compared(dense: Dense, a: list[int], b: list[int]) -> dict[int, dict[str, Any]]:
    """Return what compare_groups should say, feature after feature, by SciPy."""
    docs_a, in_a = dense.documents(a)
    docs_b, in_b = dense.documents(b)
    fires = np.flatnonzero((in_a > 0).any(axis=0) | (in_b > 0).any(axis=0)).tolist()
    expected: dict[int, dict[str, Any]] = {}
    for feature in fires:
        x, y = in_a[:, feature], in_b[:, feature]
        one = {
            "mean_a": x.mean(),
            "mean_b": y.mean(),
            "fired_a": (x > 0).sum(),
            "fired_b": (y > 0).sum(),
            "n_a": len(docs_a),
            "n_b": len(docs_b),
        }
        if np.ptp(x) or np.ptp(y):
            test = scipy.stats.ttest_ind(x, y, equal_var=False)
            pooled = ((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / (len(x) + len(y) - 2)
            one |= {"t": test.statistic, "df": test.df, "p": test.pvalue, "effect": (x.mean() - y.mean()) / pooled**0.5}
        else:
            one |= {"t": None, "df": None, "p": None, "effect": None}
        expected[feature] = one
    tested = [one for one in expected.values() if one["p"] is not None]
    for one, q in zip(tested, scipy.stats.false_discovery_control([one["p"] for one in tested]), strict=True):
        one["q"] = q
    return expected


def assert_compared(found: list[dict[str, Any]], expected: dict[int, dict[str, Any]], k: int) -> None:
    def place(feature: int) -> tuple[bool, float, int]:
        effect = expected[feature]["effect"]
        return effect is None, -round(abs(effect or 0), 9), feature

    assert [one["feature"] for one in found] == sorted(expected, key=place)[:k]
    for one in found:
        for name, value in expected[one["feature"]].items():
            wanted = None if value is None else pytest.approx(value, rel=1e-7, abs=1e-12)
            assert one[name] == wanted, (one["feature"], name)


@ASKED
@given(data=st.data(), sae=st.sampled_from([RES, ATT]), k=st.sampled_from([1, 10, 300]), rest=st.booleans())
def test_compare_groups(
    opened: Store, dense: dict[str, Dense], data: st.DataObject, sae: str, k: int, rest: bool
) -> None:
    documents = [doc for doc in range(N_DOCUMENTS) if doc != EMPTY]
    a = data.draw(st.lists(st.sampled_from(documents), min_size=2, max_size=20, unique=True))
    others = [doc for doc in documents if doc not in a]
    b = others if rest else data.draw(st.lists(st.sampled_from(others), min_size=2, max_size=20, unique=True))
    asked = {"sae": sae, "a": a, "k": k} | ({} if rest else {"b": b})
    assert_compared(opened.query("compare_groups", asked).rows(), compared(dense[sae], a, b), k)


def test_compare_groups_by_metadata(opened: Store, small: SmallStore, truth: Truth, dense: dict[str, Dense]) -> None:
    found = opened.query("compare_groups", {"sae": RES, "a": "kind=list", "b": "kind=fact", "k": 20}).rows()
    a, b = ([doc for doc, one in enumerate(small.documents) if one["kind"] == kind] for kind in ("list", "fact"))
    assert_compared(found, compared(dense[RES], a, b), 20)
    for one in found:
        group = a if one["mean_a"] > one["mean_b"] else b
        inside = truth.plain & np.isin(truth.doc, group)
        values = dense[RES].values[:, one["feature"]]
        assert values[truth.place[one["row"]]] == values[inside].max()
        assert one["example"] == truth.snippet(one["row"], 8, 4)


def test_what_does_not_vary_has_no_effect(small: SmallStore, tmp_path: Path) -> None:
    """Of documents that are the same three times over only rounding could make a spread, and with it a huge effect."""
    texts = ["Nina likes tea and a long walk."] * 3 + ["A short list of metals:\n- tin"] * 3
    saes = [str(small.sae_folders[RES])]
    actstore.extract(MODEL, texts, out=tmp_path / "s.act", saes=saes, device="cpu", allow_unhealthy=True)
    with actstore.open(tmp_path / "s.act") as store:
        found = store.query("compare_groups", {"sae": RES, "a": "0-2", "k": 300}).rows()
    assert max(one["fired_a"] for one in found) == max(one["fired_b"] for one in found) == 3
    assert [one["feature"] for one in found] == sorted(one["feature"] for one in found)
    for one in found:
        assert {one["fired_a"], one["fired_b"]} <= {0, 3}
        assert [one[name] for name in ("effect", "t", "df", "p", "q")] == [None] * 5


@pytest.mark.parametrize("df", [1, 1.5, 7, 33.3, 400, 1e6])
def test_t_test_p_is_students(opened: Store, df: float) -> None:
    t = [-40.0, -3.0, -0.5, 0.0, 1e-9, 2.0, 12.0, 300.0]
    found = opened.sql("SELECT t_test_p(unnest($t), $df) AS p", {"t": t, "df": float(df)}).numpy()["p"]
    np.testing.assert_allclose(found, 2 * scipy.stats.t.sf(np.abs(t), df), rtol=1e-9)
    assert opened.sql("SELECT t_test_p(NULL, 3)").scalar() is None


# Directions


def probed(truth: Truth, site: str, a: np.ndarray, b: np.ndarray, fitted: np.ndarray) -> dict[str, Any]:
    """Return scores of the rows of both groups (by place), and what is said of the direction."""
    vectors = truth.matrix(f"sites/{site}").astype(np.float64)
    own_a, own_b = np.isin(a, fitted), np.isin(b, fitted)
    mean_a, mean_b = vectors[a[own_a]].mean(axis=0), vectors[b[own_b]].mean(axis=0)
    direction = mean_a - mean_b
    distance = np.linalg.norm(direction)
    scores = {int(place): (vectors[place] - (mean_a + mean_b) / 2) @ direction / distance for place in [*a, *b]}
    judged = (np.ones(len(a), bool), np.ones(len(b), bool)) if own_a.all() and own_b.all() else (~own_a, ~own_b)
    right = [scores[place] > 0 for place in a[judged[0]]], [scores[place] < 0 for place in b[judged[1]]]
    return {
        "scores": scores,
        "accuracy": np.mean([np.mean(side) for side in right]),
        "distance": distance,
        "n": (int(own_a.sum()), int(own_b.sum())),
    }


def assert_probed(found: list[dict[str, Any]], truth: Truth, expected: dict[str, Any], k: int) -> None:
    scores = expected["scores"]
    ordered = sorted(scores.values(), reverse=True)
    wanted = ordered if 2 * k >= len(ordered) else [*ordered[:k], *ordered[-k:]]
    np.testing.assert_allclose([one["score"] for one in found], wanted, atol=1e-9)
    for one in found:
        assert one["score"] == pytest.approx(scores[truth.place[one["row"]]])
        assert one["accuracy"] == pytest.approx(expected["accuracy"])
        assert one["distance"] == pytest.approx(expected["distance"])
        assert (one["n_a"], one["n_b"]) == expected["n"]
        assert one["example"] == truth.snippet(one["row"], 10, 4)


@ASKED
@given(data=st.data(), site=st.sampled_from(["resid_post.3", "z.2", "final"]), k=st.sampled_from([1, 5, 1000]))
def test_probe_direction_of_rows(opened: Store, truth: Truth, data: st.DataObject, site: str, k: int) -> None:
    places = data.draw(st.lists(st.integers(0, len(truth.rows) - 1), min_size=2, max_size=50, unique=True))
    cut = data.draw(st.integers(1, len(places) - 1))
    a, b = np.array(places[:cut]), np.array(places[cut:])
    asked = {"site": site, "a_rows": truth.rows[a].tolist(), "b_rows": truth.rows[b].tolist(), "k": k}
    found = opened.query("probe_direction", asked).rows()
    assert_probed(found, truth, probed(truth, site, a, b, np.array(places)), k)
    assert all(one["side"] == ("a" if truth.place[one["row"]] in a else "b") for one in found)


@pytest.mark.parametrize("tokens", [None, [" the", "."]])
@pytest.mark.parametrize("fit_on", [None, "0-20"])
def test_probe_direction_of_documents(
    opened: Store,
    truth: Truth,
    small: SmallStore,
    dense: dict[str, Dense],
    tokens: list[str] | None,
    fit_on: str | None,
) -> None:
    asked = {"site": "resid_post.4", "a": "kind=list", "b": "kind=fact", "tokens": tokens, "fit_on": fit_on, "k": 15}
    found = opened.query("probe_direction", asked).rows()
    kind = np.array([one["kind"] for one in small.documents])[truth.doc]
    chosen = dense[RES].places_of_tokens(tokens) if tokens else np.flatnonzero(truth.plain)
    a, b = chosen[kind[chosen] == "list"], chosen[kind[chosen] == "fact"]
    fitted = np.flatnonzero(truth.doc <= 20) if fit_on else np.arange(len(truth.rows))
    assert_probed(found, truth, probed(truth, "resid_post.4", a, b, fitted), 15)
    assert all(one["fitted"] == (fit_on is None or one["doc"] <= 20) for one in found)


# What is refused


@pytest.mark.parametrize(
    ("name", "asked", "kind", "message"),
    [
        pytest.param(
            "compare_groups", {"sae": RES, "a": "5-9", "b": "9-12"}, QueryError, "Document 9 is in both", id="both"
        ),
        pytest.param("compare_groups", {"sae": RES, "a": "kind=lists"}, QueryError, "Group a has 0 ", id="empty a"),
        pytest.param(
            "compare_groups", {"sae": RES, "a": "3,4", "b": "1"}, QueryError, "group b 0 documents", id="no rows"
        ),
        pytest.param("compare_groups", {"sae": RES, "a": "3"}, QueryError, "each needs 2", id="one document"),
        pytest.param("compare_groups", {"sae": RES, "a": "900-999"}, QueryError, "documents 0 to 44", id="none such"),
        pytest.param(
            "compare_groups", {"sae": RES, "a": "list"}, QueryError, "topic=sports & doc=0-99", id="no condition"
        ),
        pytest.param("compare_groups", {"sae": RES}, QueryError, "needs a", id="no group"),
        pytest.param(
            "feature_expression", {"sae": RES, "docs": "77"}, QueryError, "documents 0 to 44", id="no document"
        ),
        pytest.param(
            "feature_expression",
            {"sae": RES, "features": [256]},
            QueryError,
            "There is no feature 256",
            id="no feature",
        ),
        pytest.param(
            "feature_expression", {"sae": RES, "measure": "sum"}, QueryError, "accepted: mean, max, share", id="measure"
        ),
        pytest.param(
            "token_expression", {"sae": RES, "docs": "1"}, QueryError, "No document with plain", id="empty one"
        ),
        pytest.param(
            "token_expression",
            {"sae": ATT, "docs": 3, "features": "96"},
            QueryError,
            "no feature 96",
            id="no feature here",
        ),
        pytest.param("probe_direction", {"site": "resid_post.1", "a": 3}, QueryError, "group b 0 rows", id="one group"),
        pytest.param(
            "probe_direction",
            {"site": "resid_post.1", "a_rows": "5-9", "b_rows": "9-10"},
            QueryError,
            "Row 9 is in both groups",
            id="rows of both",
        ),
        pytest.param(
            "probe_direction",
            {"site": "resid_post.1", "a_rows": "5", "b_rows": [1 << 40]},
            UnknownName,
            "There is no row",
            id="no row",
        ),
        pytest.param(
            "probe_direction", {"site": "resid_post.9", "a": 3, "b": 4}, UnknownName, "resid_post.3", id="no site"
        ),
        pytest.param(
            "probe_direction",
            {"site": "resid_post.1", "a": 3, "b": 4, "tokens": "no token"},
            UnknownName,
            "No single token",
            id="no token",
        ),
    ],
)
def test_a_wrong_question_is_an_error_that_helps(
    opened: Store, name: str, asked: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        opened.query(name, asked)
    assert message in str(caught.value)
