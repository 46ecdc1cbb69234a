"""Queries about documents, contents and health, against the files of a store as zarr and json alone read them."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from queries_support import assert_ranked
from tiny_world import ATTENTION_SAE, RESIDUAL_SAE, STRANGE, WORDS, extract, tiny_world
from zarr.storage import ZipStore

import actstore
from actstore import maintenance
from actstore.api import Store
from actstore.errors import QueryError

N_FEATURES = {RESIDUAL_SAE: 300, ATTENTION_SAE: 200}
LATE, GONE = "late", "gone"  # SAEs of a second pass: of the first segment alone; dropped
VALUES = [
    *(None, True, False, 0, 1, 1.0, -0.0, 0.1, 1e300, 1e-7, 2**64 - 1, "", "null", "1", "é", "日本", "a & b"),
    *('a "b" \\ \n c', " x=y ", "' OR 1=1 --", [], {}, [1, 2], {"a": [1, {"b": None}], "z": "ü"}),
]
KEYS = ["v", 'q"t', "a.b", "0", "日本", "#", "topic"]
N_DOCUMENTS, N_APPENDED = 26, 10
LABELS = {(RESIDUAL_SAE, feature): f"«{feature}» is ü" for feature in range(0, 300, 3)} | {(LATE, 8): "eight"}
ASKED = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def some_documents() -> list[dict[str, Any]]:
    """Return documents of which some are odd, empty, alike or long, with metadata of every kind of JSON."""
    random = np.random.default_rng(11)
    texts = [*STRANGE, "the cat on a hat", "the cat on a hat", "a lone \ud800 surrogate", "cat " * 40]
    texts += [" ".join(random.choice(WORDS, size=random.integers(1, 40))) for _ in range(N_DOCUMENTS - len(texts))]
    random.shuffle(texts)
    documents: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        metadata: dict[str, Any] = {key: VALUES[random.integers(len(VALUES))] for key in KEYS if random.random() < 0.7}
        documents.append({"text": text, "v": VALUES[number % len(VALUES)], **metadata, "topic": f"t{number % 3}"})
    return documents


class Raw:
    """What lies in the files of a store, by docs/format.md and without a reader of actstore's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layout = self.read("layout.json")
        self.shard_rows = self.read("store.json")["shard_rows"]
        self.arrays = zarr.open_group(path / "arrays", mode="r")
        tokens = self.array("corpus/tokens")
        self.rows = np.flatnonzero(tokens[:, 0] >= 0)
        self.tokens = tokens[self.rows]
        self.token_id, self.seq, self.pos, self.start, self.end, flags, _ = self.tokens.T
        self.plain = flags == 0
        segments = [f"corpus/segments/{one['segment']}" for one in self.layout["segments"]]
        self.sequences = np.concatenate([self.array(f"{one}/sequences") for one in segments])
        self.doc = self.sequences[self.seq, 0]
        self.texts: list[str] = []
        self.metadata: list[dict[str, Any]] = []
        for one in segments:
            text, metadata = (self.array(f"{one}/{name}").tobytes() for name in ("text", "metadata"))
            for bounds in self.array(f"{one}/documents").tolist():
                self.texts.append(text[bounds[0] : bounds[1]].decode())
                self.metadata.append(json.loads(metadata[bounds[2] : bounds[3]]))

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_bytes())

    def array(self, name: str) -> np.ndarray:
        return np.asarray(self.arrays[name])

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """Every firing by SAE, (row in use, feature), 0 where nothing fires."""
        coders = [coder for made in self.passes().values() for coder in made["recipe"]["saes"]]
        return {coder["sae"]: self._dense(coder["sae"], coder["width"]) for coder in coders}

    def _dense(self, sae: str, width: int) -> np.ndarray:
        dense: np.ndarray = np.zeros((len(self.array("corpus/tokens")), width))
        for file in (self.path / "firings" / sae).glob("[0-9]*.zip"):
            csr = zarr.open_group(ZipStore(file, mode="r"), mode="r")
            indptr, indices, data = (np.asarray(csr[name]) for name in ("indptr", "indices", "data"))
            rows = np.repeat(np.arange(self.shard_rows), np.diff(indptr))
            dense[int(file.stem) * self.shard_rows + rows, indices] = data
        return np.asarray(dense[self.rows])

    @cached_property
    def vocabulary(self) -> list[str]:
        file = self.path / "kit" / f"{self.read('store.json')['vocabulary']}.zip"
        piece = zarr.open_group(ZipStore(file, mode="r"), mode="r")
        text, bounds = np.asarray(piece["text"]).tobytes(), np.asarray(piece["bounds"]).tolist()
        return [text[first:last].decode() for first, last in pairwise(bounds)]

    def passes(self) -> dict[str, Any]:
        return {name: self.read(f"passes/{name}/pass.json") for name in self.layout["passes"]}

    def done(self, name: str) -> set[int]:
        """Return the shards of a pass that have receipts: by themselves, or in what seals their segment."""
        folder = self.path / "passes" / name
        shards = {int(file.stem) for file in folder.glob("receipts/[0-9]*.json")}
        for file in folder.glob("sealed-*.json"):
            one = self.layout["segments"][int(file.stem.removeprefix("sealed-"))]
            shards |= set(range(one["first_shard"], one["first_shard"] + one["n_shards"]))
        return shards

    def snippet(self, place: int, before: int, after: int) -> str:
        """Return a row's token between « and », with its neighbours in the sequence, as the document has them."""
        near = [one for one in range(place - before, place + after + 1) if 0 <= one < len(self.seq)]
        near = [one for one in near if self.seq[one] == self.seq[place]]
        text, start, end = self.texts[self.doc[place]], self.start[place], self.end[place]
        shown = text[start:end] or self.vocabulary[self.token_id[place]]
        return f"{text[self.start[near].min() : start]}«{shown}»{text[end : self.end[near].max()]}"

    def health(self) -> list[dict[str, Any]]:
        """Return the checks of all passes, less those of SAEs that were dropped, and what tokenising noticed."""
        found = []
        for one in self.layout["segments"]:
            said = self.read(f"passes/corpus/sealed-{one['segment']}.json")["describe"]
            for name, harmless in (("replaced_surrogates", False), ("empty_documents", True)):
                expected = "any number" if harmless else "0: the text is stored with U+FFFD in their place"
                subject, value, ok = f"segment {one['segment']}", said[name], harmless or said[name] == 0
                found.append({"name": name, "subject": subject, "value": value, "expected": expected, "ok": ok})
        for made in self.passes().values():
            kept = self.layout["artifacts"]
            gone = {one["sae"] for one in made["recipe"]["saes"] if f"firings/{one['sae']}" not in kept}
            of_gone = [one["name"][:4] == "sae_" and one["subject"].split(" @ ")[0] in gone for one in made["health"]]
            found += [one for one, is_gone in zip(made["health"], of_gone, strict=True) if not is_gone]
        return found


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store after its extraction; and grown: passes that lack the second segment, a drop, labels."""
    folder = tmp_path_factory.mktemp("documents")
    documents, world = some_documents(), tiny_world()
    first, more = documents[:-N_APPENDED], documents[-N_APPENDED:]
    residual = world.residual_sae.partition("=")[2]
    options: dict[str, Any] = {
        "dataset": first,
        "saes": [world.residual_sae, world.attention_sae],
        "lens_k": 1,
        "lens_sites": ["resid_pre.1", "resid_post.1"],
        "sites": ["resid_post.1", "final"],
        "attention_top": 2,
        "encode_special": True,
        "stride": 16,
        "shard_rows": 256,
        "batch_tokens": 1024,
    }
    grown = folder / "grown.act"
    extract(grown, **options)
    shutil.copytree(grown, folder / "begun.act")
    second = [f"{sae}={residual}" for sae in (LATE, GONE)]
    actstore.encode(grown, second, device="cpu", allow_unhealthy=True, with_index=False)
    maintenance.drop(grown, GONE)
    third: dict[str, Any] = {
        "dataset": None,
        "sites": ["z.0"],
        "saes": [],
        "lens_k": 0,
        "lens_sites": [],
        "attention_top": 0,
    }
    extract(grown, **options | third, into=True, with_index=False)
    extract(grown, **options, append=more)
    named = [{"sae": sae, "feature": feature, "label": label} for (sae, feature), label in LABELS.items()]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, named)), encoding="utf-8")
    maintenance.label(grown, folder / "labels.jsonl")
    return {"begun": folder / "begun.act", "grown": grown}


@pytest.fixture(scope="module")
def raw(stages: dict[str, Path]) -> Raw:
    return Raw(stages["grown"])


@pytest.fixture(scope="module")
def grown(stages: dict[str, Path]) -> Iterator[Store]:
    with actstore.open(stages["grown"]) as store:
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


# Contents and health


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
