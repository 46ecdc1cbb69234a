"""The questions about features and documents, each against numpy over the stored arrays."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from asking_support import ALWAYS, ATT, DEAD, RES, SmallStore, Truth

from actstore.api import Store
from actstore.errors import QueryError

FEATURES = [(RES, 9), (RES, ALWAYS), (RES, 200), (RES, DEAD), (ATT, 3), (ATT, ALWAYS)]


@pytest.fixture(scope="module")
def truth(small: SmallStore) -> Truth:
    return small.truth


def asked(store: Store, name: str, **parameters: Any) -> list[dict[str, Any]]:
    return store.query(name, parameters).rows()


def rows_of(truth: Truth, sae: str, feature: int) -> set[int]:
    return set(truth.plain_firings(sae, feature).row.tolist())


def test_contents_lists_everything_that_is_stored(opened: Store, truth: Truth) -> None:
    found = {(row["kind"], row["name"]): row["n"] for row in asked(opened, "contents")}
    assert found["corpus", opened.sql("SELECT model FROM store").scalar()] == opened.reader.layout.n_docs
    assert {name for kind, name in found if kind == "site"} == set(opened.sites)
    for sae in (RES, ATT):
        assert found["SAE", sae] == len(truth.plain_firings(sae).row)
    assert found["predictions", "predictions"] == len(truth.rows)
    assert found["lens", "logit resid_post.3"] == len(truth.rows)


@pytest.mark.parametrize("doc", [0, 3, 4, 17])
def test_document_gives_every_token_with_what_was_expected_there(opened: Store, truth: Truth, doc: int) -> None:
    found = asked(opened, "document", doc=doc)
    places = np.flatnonzero(truth.doc == doc)
    assert [row["row"] for row in found] == truth.rows[places].tolist()
    values, ids = truth.matrix("predictions/values"), truth.matrix("predictions/ids")
    for row, place in zip(found, places, strict=True):
        assert row["token"] == truth.vocabulary[truth.field("token_id")[place]]
        assert row["is_plain"] == truth.plain[place]
        if truth.field("pos")[place] == 0:
            assert row["expected"] is None and row["surprise"] is None
            continue
        assert row["expected"] == truth.vocabulary[ids[place - 1, 1]]
        assert row["surprise"] == pytest.approx(-values[place - 1, 0] / math.log(2), rel=1e-5)
        assert row["probability"] == pytest.approx(math.exp(values[place - 1, 0]), rel=1e-5)


@pytest.mark.parametrize(("sae", "feature"), FEATURES)
@pytest.mark.parametrize("intervals", [1, 4, 10])
def test_examples_by_interval_lie_in_their_intervals(
    opened: Store, truth: Truth, sae: str, feature: int, intervals: int
) -> None:
    found = asked(opened, "examples_by_interval", sae=sae, feature=feature, intervals=intervals, per_interval=3)
    fired = truth.plain_firings(sae, feature)
    if not len(fired.row):
        assert found == []
        return
    top = float(fired.activation.max())
    bins = np.minimum(intervals - 1, np.floor(intervals * (fired.activation.astype(float) / top)).astype(int))
    counts = Counter(bins.tolist())
    by_bin: dict[int, list[dict[str, Any]]] = {}
    for row in found:
        by_bin.setdefault(round(row["above"] / top * intervals), []).append(row)
    assert set(by_bin) == set(counts)
    activation = dict(zip(fired.row.tolist(), fired.activation.tolist(), strict=True))
    for number, rows in by_bin.items():
        own = fired.row[bins == number]
        assert len(rows) == min(3, counts[number]) and {row["n_firings"] for row in rows} == {counts[number]}
        assert {row["row"] for row in rows} <= set(own.tolist()) and own.min() in {row["row"] for row in rows}
        for row in rows:
            assert row["activation"] == activation[row["row"]]
            assert row["example"] == truth.snippet(row["row"], 10, 10)


@pytest.mark.parametrize(("sae", "feature"), FEATURES)
def test_activation_histogram_counts_equal_bins(opened: Store, truth: Truth, sae: str, feature: int) -> None:
    found = asked(opened, "activation_histogram", sae=sae, feature=feature)
    values = truth.plain_firings(sae, feature).activation.astype(float)
    assert sum(row["n_firings"] for row in found) == len(values)
    if len(values):
        expected = np.bincount(np.minimum(19, np.floor(20 * values / values.max()).astype(int)), minlength=20)
        assert [row["n_firings"] for row in found] == expected.tolist()
        assert found[-1]["up_to"] == values.max() and found[0]["above"] == 0
        assert [row["share"] for row in found] == pytest.approx((expected / len(values)).tolist())


@pytest.mark.parametrize("max_firings", [0, 3, 50])
def test_dead_features_are_those_that_hardly_fire(
    opened: Store, truth: Truth, small: SmallStore, max_firings: int
) -> None:
    found = asked(opened, "dead_features", sae=RES, max_firings=max_firings, k=1000)
    counts = np.bincount(truth.plain_firings(RES).feature, minlength=len(small.saes[RES]["threshold"]))
    assert {row["feature"] for row in found} == set(np.flatnonzero(counts <= max_firings).tolist()) and DEAD in {
        row["feature"] for row in found
    }
    assert all(row["n_found"] == len(found) and row["n_features"] == len(counts) for row in found)


@pytest.mark.parametrize(("sae", "feature"), FEATURES)
def test_feature_tokens_have_their_lift_over_chance(opened: Store, truth: Truth, sae: str, feature: int) -> None:
    found = asked(opened, "feature_tokens", sae=sae, feature=feature, min_firings=1, k=100_000)
    fired = truth.plain_firings(sae, feature)
    ids = truth.field("token_id")[truth.places(fired.row)]
    every = Counter(truth.field("token_id")[truth.plain].tolist())
    assert {row["token_id"] for row in found} == set(ids.tolist())
    for row in found:
        mine = ids == row["token_id"]
        n_rows = every[row["token_id"]]
        assert (row["n_firings"], row["n_rows"]) == (mine.sum(), n_rows)
        assert row["precision"] == pytest.approx(mine.sum() / n_rows)
        assert row["recall"] == pytest.approx(mine.mean())
        assert row["lift"] == pytest.approx(mine.mean() / (n_rows / truth.plain.sum()))
        assert row["mean_activation"] == pytest.approx(fired.activation[mine].astype(float).mean())
        assert row["max_activation"] == fired.activation[mine].max()


@pytest.mark.parametrize(("sae", "feature"), [(RES, 9), (ATT, 3)])
def test_feature_logits_are_the_ends_of_the_direct_path(
    opened: Store, small: SmallStore, sae: str, feature: int
) -> None:
    found = asked(opened, "feature_logits", sae=sae, feature=feature)
    stored = opened.reader.feature_logits(sae)
    assert stored is not None
    token_ids, logits = (array[feature] for array in stored)
    assert [row["side"] for row in found] == ["raised"] * 10 + ["lowered"] * 10
    assert [row["rank"] for row in found] == [*range(1, 11)] * 2
    assert [row["token_id"] for row in found] == token_ids.tolist()
    assert [row["logit"] for row in found] == logits.tolist()


@pytest.mark.parametrize(("sae", "feature"), [(RES, 9), (RES, ALWAYS), (ATT, 3)])
def test_coactivation_counts_common_rows(opened: Store, truth: Truth, sae: str, feature: int) -> None:
    found = asked(opened, "coactivation", sae=sae, feature=feature, min_both=2, k=1000)
    own, n_plain = rows_of(truth, sae, feature), int(truth.plain.sum())
    partners = {}
    for other in np.unique(truth.plain_firings(sae).feature).tolist():
        theirs = rows_of(truth, sae, other)
        if other != feature and len(own & theirs) >= 2:
            partners[other] = (len(own & theirs), len(theirs))
    assert {row["feature"]: (row["n_both"], row["n_firings"]) for row in found} == partners
    for row in found:
        n_both, n_theirs = partners[row["feature"]]
        assert row["jaccard"] == pytest.approx(n_both / (len(own) + n_theirs - n_both))
        assert row["pmi"] == pytest.approx(math.log(n_both * n_plain / (len(own) * n_theirs)))
    shares = [row["jaccard"] for row in found]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("by", ["token", "document", "row"])
@pytest.mark.parametrize("sae", [RES, ATT])
def test_dark_matter_is_what_is_explained_worst(opened: Store, truth: Truth, sae: str, by: str) -> None:
    found = asked(opened, "dark_matter", sae=sae, by=by, k=10, min_rows=1)
    values = truth.matrix(f"reconstruction/{sae}").astype(float)
    keys = {"token": truth.field("token_id"), "document": truth.doc, "row": truth.rows}[by]
    shares = {}
    for key in np.unique(keys[truth.plain]).tolist():
        mine = (keys == key) & truth.plain
        shares[key] = (values[mine, 2] ** 2).sum() / (values[mine, 1] ** 2).sum()
    worst = sorted(shares.values(), reverse=True)[:10]
    assert [row["unexplained"] for row in found] == pytest.approx(worst, rel=1e-5)
    column = {"token": "token_id", "document": "doc", "row": "row"}[by]
    for row in found:
        assert row["unexplained"] == pytest.approx(shares[row[column]], rel=1e-5)


def test_dark_matter_by_something_else_is_refused(opened: Store) -> None:
    with pytest.raises(QueryError, match="accepted: token, document or row"):
        opened.query("dark_matter", {"sae": RES, "by": "layer"})


def test_health_puts_what_is_not_ok_first(opened: Store) -> None:
    everything = asked(opened, "health")
    assert len(everything) == opened.sql("SELECT count(*) FROM health").scalar()
    order = [{False: 0, None: 1, True: 2}[row["ok"]] for row in everything]
    assert order == sorted(order)
    assert [row for row in everything if row["ok"] is not True] == asked(opened, "health", all=False)
