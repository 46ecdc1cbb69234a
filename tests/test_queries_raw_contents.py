"""Queries about contents and health, against the files of a store as zarr and json alone read them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_support import ASKED, LABELS, Raw, grown_stages

import actstore
from actstore.api import Store


@pytest.fixture(scope="module")
def stages() -> dict[str, Path]:
    return grown_stages()


@pytest.fixture(scope="module")
def raw() -> Raw:
    return Raw(grown_stages()["grown"])


@pytest.fixture(scope="module")
def grown() -> Iterator[Store]:
    with actstore.open(grown_stages()["grown"]) as store:
        yield store


# Contents


@pytest.mark.parametrize("stage", ["begun", "grown"])
def test_contents_at_any_stage(stages: dict[str, Path], stage: str) -> None:
    raw = Raw(stages[stage])
    with actstore.open(stages[stage]) as store:
        found = store.query("contents").rows()
    expected = [*of_corpus(raw), *of_passes(raw), *of_artifacts(raw), of_health(raw)]
    order = ["corpus", "pass", "site", "sae", "lens", "attention", "predictions", "health"]
    expected.sort(key=lambda one: (order.index(one[0]), one[2] is None, one[2] or 0, one[1], one[6] or ""))
    fields = ("kind", "name", "layer", "width", "n", "counted", "detail")
    assert [tuple(one[name] for name in fields) for one in found] == expected


def of_corpus(raw: Raw) -> Iterator[tuple[Any, ...]]:
    yield "corpus", "documents", None, None, len(raw.texts), "documents", f"{len(raw.layout['segments'])} segments"
    yield "corpus", "sequences", None, None, len(raw.sequences), "sequences", None
    yield "corpus", "tokens", None, None, len(raw.rows), "rows", f"{raw.plain.sum()} plain"


def of_passes(raw: Raw) -> Iterator[tuple[Any, ...]]:
    total = len(raw.array("corpus/tokens")) // raw.shard_rows
    for name in raw.layout["passes"]:
        yield "pass", name, None, None, len(raw.done(name)), f"of {total} shards", None


def of_artifacts(raw: Raw) -> Iterator[tuple[Any, ...]]:
    labels = Counter(sae for sae, _ in LABELS) if (raw.path / "labels.json").exists() else Counter()
    total = len(raw.array("corpus/tokens")) // raw.shard_rows
    for artifact, owner in raw.layout["artifacts"].items():
        kind, _, name = artifact.partition("/")
        shards = raw.done(owner) if kind != "corpus" else set()
        n_rows = int(np.isin(raw.rows // raw.shard_rows, list(shards)).sum())
        if kind == "sites":
            array = raw.array(artifact)
            yield "site", name, layer_of(name), array.shape[1], len(shards), f"of {total} shards", str(array.dtype)
        if kind == "firings":
            (coder,) = [one for one in raw.passes()[owner]["recipe"]["saes"] if one["sae"] == name]
            fired = (raw.values[name][raw.plain] > 0).sum(axis=0)
            dead = f"{(fired == 0).sum()} dead, {labels[name]} labels"
            said = f"{coder['architecture']} at {coder['site']}, {dead}"
            yield "sae", name, layer_of(coder["site"]), len(fired), fired.sum(), "firings", said
        if kind == "lens":
            lens, site = name.split("/")
            yield "lens", lens, layer_of(site), None, n_rows, "read-outs", site
        if kind == "attention":
            n_heads = raw.array(f"{artifact}/weights").shape[1]
            yield "attention", f"attention.{name}", int(name), None, n_heads, "heads", None
        if kind == "predictions":
            yield "predictions", "predictions", None, None, n_rows, "rows", None


def of_health(raw: Raw) -> tuple[Any, ...]:
    said = Counter(one["ok"] for one in raw.health())
    return "health", "health", None, None, said.total(), "checks", f"{said[False]} not ok, {said[None]} not proved"


def layer_of(site: str) -> int | None:
    _, _, layer = site.partition(".")
    return int(layer) if layer else None


# Health


@st.composite
def globs(draw: st.DrawFn, subjects: Sequence[str]) -> str:
    """Return a subject of which some characters are a wildcard, a class of characters or its opposite."""
    parts = list(draw(st.sampled_from(subjects)))
    for place in draw(st.lists(st.integers(0, len(parts) - 1), max_size=4)):
        own = parts[place][-1:] if parts[place].isalnum() else "a"
        parts[place] = draw(st.sampled_from(["?", "*", f"[{own}x]", "[!q]", f"[!{own}]", "[a-z]", ""]))
    return "".join(parts) + draw(st.sampled_from(["", "*"]))


@ASKED
@given(data=st.data(), bad=st.booleans())
def test_checks_of_any_subjects(grown: Store, raw: Raw, data: st.DataObject, bad: bool) -> None:
    stored = raw.health()
    assert {one["ok"] for one in stored} == {True, False, None}
    subject = data.draw(globs(["*", *sorted({one["subject"] for one in stored})]))
    found = grown.query("health", {"subject": subject, "bad": bad}).rows()
    said = {"*": ".*", "?": "."}
    pattern = "".join(
        one.replace("[!", "[^") if len(one) > 1 else said.get(one, re.escape(one))
        for one in re.findall(r"\[[^]]+\]|.", subject)
    )
    kept = [one for one in stored if re.fullmatch(pattern, one["subject"]) and not (bad and one["ok"])]
    fields = ("name", "subject", "value", "expected", "ok")

    def place(one: Mapping[str, Any]) -> tuple[Any, ...]:
        return [False, None, True].index(one["ok"]), one["subject"], one["name"], one["expected"]

    assert list(map(place, found)) == sorted(map(place, kept))
    assert Counter(tuple(one[name] for name in fields) for one in found) == Counter(
        tuple(one[name] for name in fields) for one in kept
    )
