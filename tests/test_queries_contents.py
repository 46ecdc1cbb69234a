"""Queries about what is stored: contents, documents, what an SAE leaves in the dark, health; against the arrays."""

from __future__ import annotations

import json
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pytest
from asking_support import ATT, DEAD, LENS_SITES, RES, SmallStore, Truth
from extraction_support import next_tokens

from actstore.api import Store
from actstore.errors import QueryError, UnknownName

DOCUMENTS = [0, 2, 3, 4, 6, 17]


@pytest.fixture(scope="module")
def truth(small: SmallStore) -> Truth:
    return small.truth


# What is there


def test_contents(opened: Store, truth: Truth, small: SmallStore) -> None:
    found = opened.query("contents").rows()
    by_name = {(one["kind"], one["name"], one["layer"]): one for one in found}
    assert len(by_name) == len(found)
    n_shards = truth.reader.layout.n_shards
    assert by_name["corpus", "documents", None]["n"] == len(small.documents)
    assert by_name["corpus", "sequences", None]["n"] == len(truth.sequences)
    tokens = by_name["corpus", "tokens", None]
    assert (tokens["n"], tokens["detail"]) == (len(truth.rows), f"{truth.plain.sum()} plain")
    sites = [one for one in found if one["kind"] == "site"]
    assert {one["name"] for one in sites} == set(opened.sites)
    for one in sites:
        assert (one["n"], one["counted"], one["detail"]) == (n_shards, f"of {n_shards} shards", "float32")
        assert one["width"] == truth.matrix(f"sites/{one['name']}").shape[1]
    for sae, layer in ((RES, 3), (ATT, 2)):
        one = by_name["sae", sae, layer]
        plain = truth.plain_firings(sae)
        n_dead = len(small.saes[sae]["threshold"]) - len(np.unique(plain.feature))
        assert (one["n"], one["width"]) == (len(plain.row), len(small.saes[sae]["threshold"]))
        assert n_dead >= 1 and DEAD not in plain.feature
        assert one["detail"] == f"jumprelu at {('resid_post.3', 'z.2')[sae == ATT]}, {n_dead} dead, 0 labels"
    lenses = [(one["detail"], one["layer"], one["n"]) for one in found if one["kind"] == "lens"]
    assert lenses == [(site, layer, len(truth.rows)) for layer, site in enumerate(LENS_SITES)]
    n_predicted = by_name["predictions", "predictions", None]["n"]
    assert n_predicted == opened.sql("SELECT count(*) FROM predictions").scalar() > 0
    assert by_name["health", "health", None]["n"] == len(opened.sql("FROM health"))


def test_metadata_values(opened: Store, small: SmallStore) -> None:
    found = opened.query("metadata_values", {"k": 3}).rows()
    counts: dict[str, Counter[str]] = {}
    for document in small.documents:
        for key, value in document.items():
            shown = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            if key != "text":
                counts.setdefault(key, Counter())[shown] += 1
    expected = []
    for key in sorted(counts):
        ranked = sorted(counts[key].items(), key=lambda item: (-item[1], item[0]))
        expected += [(key, value, n, len(counts[key])) for value, n in ranked[:3]]
    assert [tuple(one.values()) for one in found] == expected
    (first, *_) = opened.query("metadata_values", {"key": "kind"}).rows()
    assert {first["key"]} == {"kind"} and first["n_documents"] == max(counts["kind"].values())


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("subject", ["*", "resid_post.[0-2]", RES])
def test_health(opened: Store, subject: str, bad: bool) -> None:
    found = opened.query("health", {"subject": subject, "bad": bad}).rows()
    stored = [
        one
        for one in opened.reader.tables()["health"]
        if fnmatchcase(one["subject"], subject) and not (bad and one["ok"])
    ]
    assert len(found) == len(stored)
    assert Counter((one["name"], one["subject"], one["expected"]) for one in found) == Counter(
        (one["name"], one["subject"], one["expected"]) for one in stored
    )
    order = [{False: 0, None: 1, True: 2}[one["ok"]] for one in found]
    assert order == sorted(order)


# A document


@pytest.mark.parametrize("doc", DOCUMENTS)
def test_document(opened: Store, truth: Truth, doc: int) -> None:
    found = opened.query("document", {"doc": doc}).rows()
    places = np.flatnonzero(truth.doc == doc)
    assert [one["row"] for one in found] == truth.rows[places].tolist()
    values, ids = truth.matrix("predictions/values"), truth.matrix("predictions/ids")
    targets = next_tokens(truth)
    for one, place in zip(found, places, strict=True):
        assert (one["pos"], one["seq"]) == (truth.field("pos")[place], truth.field("seq")[place])
        assert one["token"] == truth.vocabulary[truth.field("token_id")[place]]
        assert (one["is_special"] or one["is_template"] or one["is_repeat"]) != truth.plain[place]
        if truth.field("pos")[place] == 0:
            assert (one["surprise"], one["expected"], one["expected_probability"], one["entropy"]) == (None,) * 4
            continue
        assert targets[place - 1] == truth.field("token_id")[place]
        logprob, entropy, top1_prob = values[place - 1]
        assert (one["surprise"], one["entropy"], one["expected_probability"]) == (-logprob, entropy, top1_prob)
        assert one["expected"] == truth.vocabulary[ids[place - 1, 1]]


def test_one_sequence_of_a_document(opened: Store, truth: Truth) -> None:
    seqs = np.flatnonzero(truth.sequences[:, 0] == 4).tolist()
    assert len(seqs) > 2
    found = opened.query("document", {"doc": 4, "seq": seqs[1]}).rows()
    assert [one["row"] for one in found] == truth.rows[truth.field("seq") == seqs[1]].tolist()
    assert found[0]["surprise"] is None


# The dark


@pytest.mark.parametrize("sae", [RES, ATT])
@pytest.mark.parametrize(
    ("by", "min_rows"), [("row", 1), ("token", 1), ("token", 6), ("document", 1), ("document", 40)]
)
@pytest.mark.parametrize("k", [3, 5000])
def test_dark_matter(opened: Store, truth: Truth, sae: str, by: str, min_rows: int, k: int) -> None:
    found = opened.query("dark_matter", {"sae": sae, "by": by, "min_rows": min_rows, "k": k}).rows()
    l0, norm, error = truth.matrix(f"reconstruction/{sae}")[truth.plain].astype(np.float64).T
    rows = truth.rows[truth.plain]
    subjects = {"row": rows, "token": truth.field("token_id")[truth.plain], "document": truth.doc[truth.plain]}[by]
    expected: list[dict[str, Any]] = []
    for subject in np.unique(subjects):
        mine = np.flatnonzero(subjects == subject)
        worst = mine[(error[mine] / norm[mine]).argmax()]
        if len(mine) >= min_rows:
            unexplained = (error[mine] ** 2).sum() / (norm[mine] ** 2).sum()
            means = {"l0": l0[mine].mean(), "norm": norm[mine].mean(), "error_norm": error[mine].mean()}
            expected.append({"unexplained": unexplained, **means, "n_rows": len(mine), "row": int(rows[worst])})
    expected.sort(key=lambda one: -one["unexplained"])
    assert len(found) == min(k, len(expected)) > 0
    for one, wanted in zip(found, expected, strict=False):
        assert {name: one[name] for name in wanted} == pytest.approx(wanted)
        assert one["token"] == truth.vocabulary[truth.field("token_id")[truth.place[one["row"]]]]
        assert one["example"] == truth.snippet(one["row"], 10, 4)


@pytest.mark.parametrize(
    ("name", "asked", "kind", "message"),
    [
        ("document", {"doc": 45}, UnknownName, "documents 0 to 44"),
        ("document", {"doc": 3, "seq": 900}, QueryError, "document 3 has no sequence 900"),
        ("dark_matter", {"sae": RES, "by": "word"}, QueryError, "accepted: row, token, document"),
        ("dark_matter", {"sae": RES, "k": -1}, QueryError, "count from 1"),
        ("health", {"bad": "perhaps"}, QueryError, "boolean"),
    ],
)
def test_a_wrong_question_is_an_error_that_helps(
    opened: Store, name: str, asked: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        opened.query(name, asked)
    assert message in str(caught.value)
