"""The queries about attention, and a feature over a text, against loops over the stored arrays."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking_support import ALWAYS, ATT, DEAD, RES, SmallStore, Truth
from attention_support import CONTEXT, case_model, extract, truth_of

import actstore
from actstore.api import Store
from actstore.errors import QueryError, UnknownName
from actstore.named import named_query

WHOLE, N_LAYERS = 1, 3  # the layer whose pattern is stored as well


@pytest.fixture(scope="module")
def attending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A random Gemma 2 over ragged texts, three keys kept of each row, one layer whole; light edges unlisted."""
    path = tmp_path_factory.mktemp("attention") / "a.act"
    extract(case_model("gemma_2"), path, sites=[f"pattern.{WHOLE}"], attention_min=0.05)
    with actstore.open(path) as store:
        yield store


@pytest.fixture(scope="module")
def arrays(attending: Store) -> Truth:
    return truth_of(Path(attending.url))


class Tokens:
    """What is known of a row, by its number."""

    def __init__(self, truth: Truth) -> None:
        names = ("seq", "pos", "token_id", "flags")
        columns = {name: truth.field(name).tolist() for name in names}
        self.rows = truth.rows.tolist()
        self.of = {row: {name: columns[name][place] for name in names} for place, row in enumerate(self.rows)}
        for place, row in enumerate(self.rows):
            self.of[row]["doc"] = int(truth.doc[place])
            self.of[row]["token"] = truth.vocabulary[self.of[row]["token_id"]]


def kept_edges(truth: Truth, layer: int) -> list[tuple[int, int, int, float]]:
    """Return head, row, key row and weight of every kept edge."""
    weights, offsets = (truth.matrix(f"attention/{layer}/{name}") for name in ("weights", "offsets"))
    return [
        (head, row, row - int(offsets[place, head, rank]), float(weights[place, head, rank]))
        for place, row in enumerate(truth.rows.tolist())
        for head in range(weights.shape[1])
        for rank in range(weights.shape[2])
        if offsets[place, head, rank] >= 0
    ]


def whole_edges(truth: Truth, layer: int) -> list[tuple[int, int, int, float]]:
    """Return the same of every weight above 0 of a stored pattern."""
    patterns = truth.matrix(f"sites/pattern.{layer}").astype(np.float32)
    n_heads = patterns.shape[1] // CONTEXT
    return [
        (head, row, row - int(pos) + key, float(patterns[place, head * CONTEXT + key]))
        for place, (row, pos) in enumerate(zip(truth.rows.tolist(), truth.field("pos"), strict=True))
        for head in range(n_heads)
        for key in range(CONTEXT)
        if patterns[place, head * CONTEXT + key] > 0
    ]


# attention_pattern


@pytest.mark.parametrize("head", [None, 0, 5])
@pytest.mark.parametrize("doc", [0, 3, 5])
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_a_pattern_is_what_is_stored(attending: Store, arrays: Truth, layer: int, doc: int, head: int | None) -> None:
    known = Tokens(arrays).of
    edges = whole_edges(arrays, layer) if layer == WHOLE else kept_edges(arrays, layer)
    mine = [one for one in edges if known[one[1]]["doc"] == doc and head in (None, one[0])]
    found = attending.query("attention_pattern", {"layer": layer, "doc": doc, "head": head}).rows()
    order = sorted(mine, key=lambda one: (one[0], one[1], -one[3], one[2]))
    assert [(one["head"], one["row"], one["key_row"], one["weight"]) for one in found] == order
    for one in found:
        looks, seen = known[one["row"]], known[one["key_row"]]
        assert (one["seq"], one["pos"], one["token"]) == (looks["seq"], looks["pos"], looks["token"])
        assert (one["key_pos"], one["key_token"], one["layer"]) == (seen["pos"], seen["token"], layer)
        together = sum(weight for h, row, _, weight in mine if (h, row) == (one["head"], one["row"]))
        assert one["kept_weight"] == pytest.approx(together, rel=1e-6)


def test_a_whole_pattern_leaves_nothing_out(attending: Store) -> None:
    shares = attending.query("attention_pattern", {"layer": WHOLE, "doc": 3}).numpy()["kept_weight"]
    np.testing.assert_allclose(shares, 1, atol=1e-5)
    assert attending.query("attention_pattern", {"layer": 0, "doc": 3}).numpy()["kept_weight"].min() < 0.95


def test_one_sequence_of_a_document(attending: Store, arrays: Truth) -> None:
    of_document = [int(seq) for seq, (doc, _, _) in enumerate(arrays.sequences) if doc == 3]
    assert len(of_document) > 1
    for seq in of_document:
        rows = attending.query("attention_pattern", {"layer": 2, "doc": 3, "seq": seq}).rows()
        assert {one["seq"] for one in rows} == {seq}


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        pytest.param(
            {"layer": 9, "doc": 0}, UnknownName, "layer of stored attention '9'. Accepted: 0, 1, 2", id="layer"
        ),
        pytest.param({"layer": 0, "doc": 0, "head": 6}, UnknownName, "no head 6. Accepted: heads 0 to 5", id="head"),
        pytest.param({"layer": WHOLE, "doc": 0, "head": -1}, UnknownName, "There is no head -1", id="negative head"),
        pytest.param({"layer": 0, "doc": 0, "seq": 4}, QueryError, "document 0 has no sequence 4", id="sequence"),
        pytest.param({"layer": 0, "doc": 60}, UnknownName, "no document 60", id="document"),
    ],
)
def test_a_pattern_that_is_not_there(
    attending: Store, given: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        attending.query("attention_pattern", given)


# head_scores


def test_scores_of_heads_are_means_over_plain_rows(attending: Store, arrays: Truth) -> None:
    found = attending.query("head_scores").rows()
    assert [(one["layer"], one["head"]) for one in found] == [(layer, head) for layer in range(3) for head in range(6)]
    names = ("kept_weight", "entropy", "previous_token", "self_attention", "bos_attention", "induction")
    for one in found:
        values = arrays.matrix(f"attention/{one['layer']}/values")[arrays.plain, one["head"]].astype(np.float64)
        for number, name in enumerate(names[1:], start=1):
            assert one[name] == pytest.approx(np.nanmean(values[:, number]), abs=1e-8)


@pytest.mark.parametrize("by", ["entropy", "previous_token", "self_attention", "bos_attention", "induction"])
def test_scores_order_heads(attending: Store, by: str) -> None:
    found = attending.query("head_scores", {"by": by, "k": 5}).rows()
    every = attending.query("head_scores").rows()
    assert [one[by] for one in found] == sorted((one[by] for one in every), reverse=True)[:5]
    assert {one["layer"] for one in attending.query("head_scores", {"layer": 2}).rows()} == {2}
    with pytest.raises(QueryError, match=r"by is x; accepted: layer, entropy"):
        attending.query("head_scores", {"by": "x"})


# head_edges


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"doc": 3},
        {"sink": True},
        {"itself": True, "k": 7},
        {"sink": True, "itself": True, "window": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("layer", "head"), [(0, 0), (2, 4)])
def test_the_strongest_edges_of_a_head(
    attending: Store, arrays: Truth, layer: int, head: int, given: dict[str, Any]
) -> None:
    known = Tokens(arrays).of
    chosen = [
        (-weight, row, key)
        for h, row, key, weight in kept_edges(arrays, layer)
        if h == head
        and weight >= np.float32(0.05)
        and not known[row]["flags"]
        and (given.get("sink") or known[key]["pos"] > 0)
        and (given.get("itself") or key != row)
        and given.get("doc") in (None, known[row]["doc"])
    ]
    found = attending.query("head_edges", {"layer": layer, "head": head, **given}).rows()
    assert [(-one["weight"], one["row"], one["key_row"]) for one in found] == sorted(chosen)[: given.get("k", 20)]
    window = given.get("window", 6)
    for one in found:
        assert one["distance"] == one["row"] - one["key_row"]
        assert (one["token"], one["key_token"]) == (known[one["row"]]["token"], known[one["key_row"]]["token"])
        assert one["example"] == arrays.snippet(one["row"], window, window)
        assert one["key_example"] == arrays.snippet(one["key_row"], window, window)


def test_a_head_that_is_not_there_has_no_edges_but_an_error(attending: Store) -> None:
    for layer, head, message in ((0, 6, "no head 6. Accepted: heads 0 to 5"), (7, 0, "'7'. Accepted: 0, 1, 2")):
        with pytest.raises(UnknownName, match=message):
            attending.query("head_edges", {"layer": layer, "head": head})
    with pytest.raises(UnknownName, match=r"layer of stored attention '9'\. Accepted: 0, 1, 2"):
        attending.query("head_scores", {"layer": 9})


def test_edges_are_found_without_pairing_all_rows_with_all(attending: Store) -> None:
    """What compares both ends must compare columns of the edge: a join of the two ends was 12 GB for 19,000 rows."""
    query = named_query("head_edges")
    plan = str(attending.connect().execute(f"EXPLAIN {query.sql}", query.bind({"layer": 0, "head": 0})).fetchall())
    assert re.findall(r"\w+ Join|Product", plan) == ["Hash Join"] * 2


# attention_between


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"from_tokens": "cat|hat", "to_tokens": "the"}, id="tokens to a token"),
        pytest.param({"from_tokens": "a", "to_tokens": "a"}, id="itself and earlier ones"),
        pytest.param({"from_tokens": "boat"}, id="to any"),
        pytest.param({"to_tokens": "<bos>"}, id="any to a special one"),
        pytest.param({"from_rows": "0,5,11", "to_rows": "0,3"}, id="rows, one of them special"),
        pytest.param({"from_tokens": "the", "to_tokens": "hat|on", "doc": 3}, id="within a document"),
        pytest.param({"k": 4}, id="any to any"),
    ],
)
def test_which_heads_look_from_these_to_those(attending: Store, arrays: Truth, given: dict[str, Any]) -> None:
    tokens = Tokens(arrays)

    def on(side: str, row: int) -> bool:
        texts, rows = given.get(f"{side}_tokens"), given.get(f"{side}_rows")
        one = tokens.of[row]
        fits = texts is None or one["token"] in texts.split("|")
        fits &= rows is None or str(row) in rows.split(",")
        fits &= given.get("doc") in (None, one["doc"])
        return bool(fits and (side == "to" or rows is not None or not one["flags"]))

    looked_at = [row for row in tokens.rows if on("to", row)]
    able = [
        row
        for row in tokens.rows
        if on("from", row) and any(tokens.of[k]["seq"] == tokens.of[row]["seq"] and k <= row for k in looked_at)
    ]
    assert able
    expected = []
    for layer in range(N_LAYERS):
        edges = [one for one in kept_edges(arrays, layer) if one[1] in able and one[2] in looked_at]
        for head in range(6):
            mine = [(weight, -row) for h, row, _, weight in edges if h == head]
            mean = sum(weight for weight, _ in mine) / len(able)
            strongest = max(mine, default=(None, None))
            expected.append((-mean, layer, head, len(mine), *strongest))
    found = attending.query("attention_between", given).rows()
    assert len(found) == given.get("k", 18)
    by_head = {one[1:3]: one for one in expected}
    for one in found:
        negative, _, _, n_edges, weight, row = by_head[one["layer"], one["head"]]
        assert one["mean_weight"] == pytest.approx(-negative, abs=1e-9)
        assert (one["n_rows"], one["n_edges"], one["max_weight"]) == (len(able), n_edges, weight)
        assert one["row"] == (None if row is None else -row)
        assert one["example"] == (None if row is None else arrays.snippet(-row, 8, 2))
    means = [one["mean_weight"] for one in found]
    assert all(first >= second for first, second in pairwise(means))
    assert means == pytest.approx(sorted((-one[0] for one in expected), reverse=True)[: len(means)], abs=1e-9)


@pytest.mark.parametrize(
    "given", [{"from_rows": [5, 23]}, {"to_rows": [10**9]}, {"from_rows": [5], "to_rows": [-0, 23]}]
)
def test_rows_that_are_not_there_are_an_error(attending: Store, arrays: Truth, given: dict[str, Any]) -> None:
    assert 23 not in arrays.place
    with pytest.raises(QueryError, match=r"There is no row (23|1000000000)"):
        attending.query("attention_between", given)


def test_tokens_that_never_meet_and_texts_that_are_no_token(attending: Store) -> None:
    assert len(attending.query("attention_between", {"from_tokens": "cat", "to_tokens": "not", "doc": 0})) == 0
    with pytest.raises(UnknownName, match="No single token is shown as 'the cat'"):
        attending.query("attention_between", {"from_tokens": "the cat"})


def test_without_attention_the_command_that_stores_it_is_named(opened: Store) -> None:
    for name, given in (("head_scores", {}), ("head_edges", {"layer": 0, "head": 0}), ("attention_between", {})):
        with pytest.raises(QueryError, match="--attention-top"):
            opened.query(name, given)


# feature_in_document


@pytest.mark.parametrize("doc", [0, 2, 6])
@pytest.mark.parametrize(("sae", "feature"), [(RES, 9), (RES, ALWAYS), (RES, DEAD), (ATT, 3)])
def test_a_feature_over_the_text_of_a_document(
    opened: Store, small: SmallStore, sae: str, feature: int, doc: int
) -> None:
    truth = small.truth
    fired = truth.firings(sae)
    mine = fired.feature == feature
    strengths = dict(zip(fired.row[mine].tolist(), fired.activation[mine].tolist(), strict=True))
    plain = truth.plain_firings(sae, feature).activation
    found = opened.query("feature_in_document", {"sae": sae, "feature": feature, "doc": doc}).rows()
    assert [one["row"] for one in found] == truth.rows[truth.doc == doc].tolist()
    for one in found:
        place = truth.place[one["row"]]
        assert one["activation"] == strengths.get(one["row"], 0)
        assert one["token"] == truth.vocabulary[truth.field("token_id")[place]]
        assert (one["seq"], one["pos"]) == (truth.field("seq")[place], truth.field("pos")[place])
        share = one["activation"] / plain.max() if len(plain) else None
        assert one["share"] == (None if share is None else pytest.approx(share))
