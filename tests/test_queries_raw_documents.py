"""Queries about documents and their metadata, against the files of a store as zarr and json alone read them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from queries_support import assert_ranked
from raw_support import ASKED, KEYS, LABELS, N_DOCUMENTS, VALUES, Raw, grown_stages
from tiny_world import ATTENTION_SAE, RESIDUAL_SAE

import actstore
from actstore.api import Store
from actstore.errors import QueryError

N_FEATURES = {RESIDUAL_SAE: 300, ATTENTION_SAE: 200}


@pytest.fixture(scope="module")
def raw() -> Raw:
    return Raw(grown_stages()["grown"])


@pytest.fixture(scope="module")
def grown() -> Iterator[Store]:
    with actstore.open(grown_stages()["grown"]) as store:
        yield store


# Documents that fit conditions


def shown(value: Any) -> str | None:
    """Return a value of the metadata as queries show it: text as it is, else compact JSON; nothing for null."""
    if value is None or isinstance(value, str):
        return value
    said = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub(r"e\+?(-?)0*", r"e\1", said) if isinstance(value, float) else said


def like(text: str, pattern: str) -> bool:
    parts = {"%": ".*", "_": "."}
    return re.fullmatch("".join(parts.get(one, re.escape(one)) for one in pattern), text, re.DOTALL) is not None


def fitting(raw: Raw, conditions: Mapping[str, Any] | None) -> list[int]:
    """Return the documents with plain rows that fit all conditions."""
    found: list[int] = np.unique(raw.doc[raw.plain]).tolist()
    for key, value in (conditions or {}).items():
        if key == "doc":
            found = [doc for doc in found if doc in value]
        elif key == "text":
            found = [doc for doc in found if like(raw.texts[doc], value)]
        else:
            found = [doc for doc in found if shown(raw.metadata[doc].get(key)) == value]
    return found


TEXTS = [one for one in map(shown, VALUES) if one is not None]
PATTERNS = ["%", "%the%", "the%", "%t", "_%_%_%", "%c_t%", "%\n%", "%é%", "%the_cat%on%", "%\0%", "%THE%"]
CONDITIONS = st.fixed_dictionaries(
    {},
    optional={
        "doc": st.lists(st.integers(0, N_DOCUMENTS + 3), min_size=4, max_size=30),
        "text": st.sampled_from(PATTERNS),
        "topic": st.sampled_from(["t0", "t1", "t2"]),
    },
) | st.builds(lambda key, value: {key: value}, st.sampled_from(KEYS), st.sampled_from(TEXTS))
FEATURES = st.none() | st.lists(st.integers(0, 199), min_size=1, max_size=6)


def spelled(conditions: Mapping[str, Any], as_text: bool) -> Any:
    """Return conditions as a mapping or, where this loses nothing, as text."""
    texts = {key: ",".join(map(str, value)) if key == "doc" else value for key, value in conditions.items()}
    loses = any(value != value.strip() or " & " in value for value in texts.values())
    return conditions if loses or not as_text else " & ".join(f"{key}={value}" for key, value in texts.items())


def asked_of(
    grown: Store, raw: Raw, name: str, asked: dict[str, Any], conditions: Mapping[str, Any]
) -> tuple[list[int], list[dict[str, Any]]]:
    """Return the documents that fit and the answer; where none fits, assert that this is an error, return nothing."""
    docs = fitting(raw, conditions)
    if not docs:
        with pytest.raises(QueryError, match="No document with plain rows fits"):
            grown.query(name, asked)
        return [], []
    return docs, grown.query(name, asked).rows()


@ASKED
@example(sae=RESIDUAL_SAE, conditions={"text": "%THE%"}, as_text=True, features=[7], k=1, measure="max")
@given(
    sae=st.sampled_from([*N_FEATURES]),
    conditions=CONDITIONS,
    as_text=st.booleans(),
    features=FEATURES,
    k=st.integers(1, 30) | st.just(320),
    measure=st.sampled_from(["mean", "max", "share"]),
)
def test_expression_of_features_in_any_documents(
    grown: Store, raw: Raw, sae: str, conditions: dict[str, Any], as_text: bool, features: Any, k: int, measure: str
) -> None:
    asked = {"sae": sae, "docs": spelled(conditions, as_text) or None, "features": features, "k": k, "measure": measure}
    docs, found = asked_of(grown, raw, "feature_expression", asked, conditions)
    if not docs:
        return
    of_docs = [raw.values[sae][raw.plain & (raw.doc == doc)] for doc in docs]
    measures = {"mean": lambda one: one.mean(axis=0), "max": lambda one: one.max(axis=0)}
    matrix = np.array([measures.get(measure, lambda one: (one > 0).mean(axis=0))(one) for one in of_docs])
    wanted = sorted(set(features or [one["feature"] for one in found]))
    if not features:
        assert_most_varied(matrix, wanted, k)
    assert [(one["doc"], one["feature"]) for one in found] == [(doc, feature) for doc in docs for feature in wanted]
    np.testing.assert_allclose([one["activation"] for one in found], matrix[:, wanted].reshape(-1), rtol=1e-12)
    assert [one["label"] for one in found] == [LABELS.get((sae, feature)) for feature in wanted] * len(docs)


def assert_most_varied(matrix: np.ndarray, chosen: list[int], k: int) -> None:
    """Assert that these are k of the features that fire and none left out varies more, up to float64's rounding."""
    variances = np.where(matrix.any(axis=0), matrix.var(axis=0), -1.0)
    assert len(chosen) == min(k, (variances >= 0).sum())
    left = np.delete(variances, chosen)
    assert not chosen or variances[chosen].min() >= max(0.0, left.max(initial=0.0) - 1e-12)


@ASKED
@given(
    sae=st.sampled_from([*N_FEATURES]),
    conditions=CONDITIONS.filter(bool),
    as_text=st.booleans(),
    features=FEATURES,
    k=st.integers(1, 12),
)
def test_expression_of_features_on_tokens_of_any_documents(
    grown: Store, raw: Raw, sae: str, conditions: dict[str, Any], as_text: bool, features: Any, k: int
) -> None:
    asked = {"sae": sae, "docs": spelled(conditions, as_text), "features": features, "k": k}
    docs, found = asked_of(grown, raw, "token_expression", asked, conditions)
    places = np.flatnonzero(raw.plain & np.isin(raw.doc, docs))
    values = raw.values[sae][places]
    sums = values.sum(axis=0)  # exact: activations have ten bits
    ranked = np.lexsort((np.arange(len(sums)), -sums))[: min(k, (sums > 0).sum())]
    wanted = sorted(set(features or ranked.tolist()))
    fields = ("row", "doc", "pos", "token", "feature", "activation", "label")
    expected = [
        (raw.rows[place], raw.doc[place], raw.pos[place], raw.vocabulary[raw.token_id[place]], feature, value, label)
        for place, line in zip(places, values, strict=True)
        for feature, value, label in ((one, line[one], LABELS.get((sae, one))) for one in wanted)
    ]
    assert [tuple(one[name] for name in fields) for one in found] == expected


@ASKED
@given(sae=st.sampled_from([*N_FEATURES]), doc=st.integers(0, N_DOCUMENTS - 1), k=st.integers(1, 320))
def test_features_that_characterise_any_document(grown: Store, raw: Raw, sae: str, doc: int, k: int) -> None:
    found = grown.query("document_features", {"sae": sae, "doc": doc, "k": k}).rows()
    values = raw.values[sae]
    places = np.flatnonzero(raw.plain & (raw.doc == doc))
    density = (values[raw.plain] > 0).mean(axis=0)
    expected: dict[int, dict[str, Any]] = {}
    for feature in np.flatnonzero(values[places].any(axis=0)).tolist():
        fired = values[places, feature]
        lift = (fired > 0).mean() / density[feature]
        count = int((fired > 0).sum())
        expected[feature] = {
            "score": count * np.log(lift),
            "lift": lift,
            "n_rows": count,
            "max_activation": fired.max(),
        }
    assert_ranked(found, expected, "score", k)
    for one in found:
        strongest = places[values[places, one["feature"]] == one["max_activation"]]
        assert one["strongest"] in [raw.snippet(place, 5, 3) for place in strongest]
        assert one["label"] == LABELS.get((sae, one["feature"]))


# Metadata


@pytest.mark.parametrize("k", [1, 2, 7, 100])
@pytest.mark.parametrize("key", [None, *KEYS, "V", "none"])
def test_metadata_of_any_key(grown: Store, raw: Raw, key: str | None, k: int) -> None:
    found = grown.query("metadata_values", {"key": key, "k": k}).rows()
    counts: dict[str, Counter[str | None]] = {}
    for metadata in raw.metadata:
        for name, value in metadata.items():
            counts.setdefault(name, Counter())[shown(value)] += 1
    expected = []
    for name in sorted(counts) if key is None else [key] if key in counts else []:
        ranked = sorted(counts[name].items(), key=lambda item: (-item[1], item[0] is None, item[0] or ""))
        expected += [(name, value, n, len(counts[name])) for value, n in ranked[:k]]
    fields = ("key", "value", "n_documents", "n_values")
    assert [tuple(one[name] for name in fields) for one in found] == expected


def test_metadata_that_are_listed_are_conditions(grown: Store, raw: Raw) -> None:
    listed = [one for one in grown.query("metadata_values", {"k": 4}).rows() if one["value"] is not None]
    assert {one["key"] for one in listed} == set(KEYS)
    for one in listed:
        asked = {"sae": RESIDUAL_SAE, "docs": {one["key"]: one["value"]}, "features": [0]}
        docs, found = asked_of(grown, raw, "feature_expression", asked, {one["key"]: one["value"]})
        fit = [doc for doc, metadata in enumerate(raw.metadata) if shown(metadata.get(one["key"])) == one["value"]]
        assert len(fit) == one["n_documents"] and {doc for doc in fit if doc not in docs} <= empty_documents(raw)
        assert [line["doc"] for line in found] == docs


def empty_documents(raw: Raw) -> set[int]:
    return set(range(len(raw.texts))) - set(raw.doc[raw.plain].tolist())
