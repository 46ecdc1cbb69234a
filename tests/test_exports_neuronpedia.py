"""Neuronpedia: batches of JSON lines, each line what a plain computation over the raw arrays says."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking_support import DEAD, RES, SmallStore
from exports_support import Raw, json_lines

import actstore
from actstore.api import Store
from actstore.exports import neuronpedia
from actstore.maintenance import label

FEATURE_KEYS = [
    "modelId",
    "layer",
    "index",
    "sourceSetName",
    "creatorId",
    "maxActApprox",
    "hasVector",
    "frac_nonzero",
    "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values",
    "pos_str",
    "pos_values",
    "neg_str",
    "neg_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
]
ACTIVATION_KEYS = [
    "id",
    "modelId",
    "layer",
    "index",
    "creatorId",
    "dataIndex",
    "tokens",
    "values",
    "maxValue",
    "maxValueTokenIndex",
    "minValue",
    "binMin",
    "binMax",
    "binContains",
    "qualifyingTokenIndex",
]
EXPLANATION_KEYS = [
    "id",
    "modelId",
    "layer",
    "index",
    "description",
    "authorId",
    "typeName",
    "explanationModelName",
]


@pytest.fixture(scope="module")
def written(opened: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return opened.export([RES], format="neuronpedia", out=tmp_path_factory.mktemp("neuronpedia") / "out").path


@pytest.fixture(scope="module")
def raw(small: SmallStore) -> Raw:
    return Raw(small.path)


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    files = sorted((folder / kind).glob("batch-*.jsonl.gz"), key=lambda path: int(path.name[6:].split(".")[0]))
    return [line for file in files for line in json_lines(file)]


def test_a_line_for_every_feature_with_the_same_keys(written: Path) -> None:
    found = lines(written, "features")
    assert [line["index"] for line in found] == [str(feature) for feature in range(256)]
    assert all(list(line) == FEATURE_KEYS for line in found)
    owner = {"modelId": "model", "layer": RES, "sourceSetName": "tiny-scope-res-256"}
    assert all(line.items() >= owner.items() for line in found)


def test_features_have_their_density_and_histogram(written: Path, raw: Raw) -> None:
    firings = raw.firings(RES)[raw.plain]
    for feature, line in enumerate(lines(written, "features")):
        values = firings[:, feature][firings[:, feature] > 0]
        assert line["frac_nonzero"] == pytest.approx(len(values) / len(firings))
        assert line["maxActApprox"] == (values.max() if len(values) else 0)
        top = line["maxActApprox"]
        heights, edges = np.histogram(values, bins=20, range=(0, top or 1))
        assert sum(line["freq_hist_data_bar_heights"]) == len(values)
        # The index closes bins above, numpy below: only a value that lies on an edge may sit in the next bin.
        moved = np.abs(np.cumsum(heights) - np.cumsum(line["freq_hist_data_bar_heights"]))
        assert moved.sum() <= np.isin(values, edges[1:].astype(np.float32)).sum()
        middles = (edges[1:] + edges[:-1]) / 2 if top else np.zeros(20)
        np.testing.assert_allclose(line["freq_hist_data_bar_values"], middles, rtol=1e-6)
    assert lines(written, "features")[DEAD]["frac_nonzero"] == 0


def test_features_have_the_ends_of_their_logits(written: Path, small: SmallStore) -> None:
    reader, vocabulary = small.truth.reader, small.truth.vocabulary
    logits = reader.feature_logits(RES)
    assert logits is not None
    half = logits[0].shape[1] // 2
    for feature, line in enumerate(lines(written, "features")):
        for name, places in (("pos", range(10)), ("neg", range(half, half + 10))):
            ids, values = logits[0][feature, list(places)], logits[1][feature, list(places)]
            assert line[f"{name}_str"] == [vocabulary[token] for token in ids]
            np.testing.assert_allclose(line[f"{name}_values"], values, rtol=1e-6)
        assert line["pos_values"] == sorted(line["pos_values"], reverse=True)
        assert line["neg_values"] == sorted(line["neg_values"])


def strongest_windows(raw: Raw, firings: np.ndarray, feature: int) -> list[tuple[int, int, int]]:
    """Return place, first and end of the window of each example: of the top 100, the best of each sequence, 20."""
    plain = np.flatnonzero(raw.plain & (firings[:, feature] > 0))
    order = sorted(plain, key=lambda place: (-firings[place, feature], raw.rows[place]))[:100]
    best: dict[int, int] = {}
    for strong in order:
        best.setdefault(int(raw.tokens["seq"][strong]), int(strong))
    found = []
    for place in list(best.values())[:20]:
        _, row, n_tokens = raw.sequences[raw.tokens["seq"][place]].tolist()
        start = int(np.searchsorted(raw.rows, row))
        found.append((place, max(start, place - 64), min(start + n_tokens, place + 64)))
    return found


def test_activations_are_the_strongest_of_each_sequence_in_their_context(
    written: Path, raw: Raw, small: SmallStore
) -> None:
    firings, vocabulary = raw.firings(RES), small.truth.vocabulary
    found = lines(written, "activations")
    assert all(list(line) == ACTIVATION_KEYS for line in found)
    assert len({line["id"] for line in found}) == len(found)
    by_feature: dict[int, list[dict[str, Any]]] = {}
    for line in found:
        by_feature.setdefault(int(line["index"]), []).append(line)
    assert list(by_feature) == [feature for feature in range(256) if feature != DEAD]
    for feature, own in by_feature.items():
        windows = strongest_windows(raw, firings, feature)
        assert len(own) == len(windows)
        for line, (place, first, end) in zip(own, windows, strict=True):
            values = firings[first:end, feature]
            assert line["values"] == values.tolist()
            assert line["tokens"] == [vocabulary[token] for token in raw.tokens["token_id"][first:end]]
            assert line["maxValue"] == values.max() and line["minValue"] == values.min()
            assert line["maxValueTokenIndex"] == values.argmax() and line["qualifyingTokenIndex"] == place - first
            assert line["dataIndex"] == str(raw.docs[place])
            assert (line["binMin"], line["binContains"]) == (-1, -1)
            assert line["binMax"] == firings[raw.plain, feature].max()


def test_long_sequences_are_cut_around_the_token(opened: Store, tmp_path: Path) -> None:
    """Windows of the small store are shorter than the context shown; a narrower one cuts on both sides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuronpedia, "_ACTIVATIONS", neuronpedia._ACTIVATIONS.replace("64", "5"))
        out = opened.export([RES], format="neuronpedia", out=tmp_path / "out").path
    found = lines(out, "activations")
    assert max(len(line["tokens"]) for line in found) == 10
    assert all(line["qualifyingTokenIndex"] <= 5 for line in found)


def test_batches_divide_the_features(
    opened: Store, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia, "BATCH_FEATURES", 100)
    out = opened.export([RES], format="neuronpedia", out=tmp_path / "out").path
    for kind in ("features", "activations"):
        files = sorted(path.name for path in (out / kind).iterdir())
        assert files == [f"batch-{batch}.jsonl.gz" for batch in range(3)]
        assert lines(out, kind) == lines(written, kind)
    assert [line["index"] for line in json_lines(out / "features" / "batch-2.jsonl.gz")] == [
        str(feature) for feature in range(200, 256)
    ]


def test_owners_are_said_once(written: Path) -> None:
    model, source_set, source = (json_lines(written / f"{name}.jsonl")[0] for name in ("model", "sourceset", "source"))
    assert (model["id"], source_set["modelId"], source["modelId"]) == ("model", "model", "model")
    assert source["id"] == RES and source["setName"] == source_set["name"] == "tiny-scope-res-256"
    assert not (written / "explanations").exists()


def test_labels_become_explanations(copied: Callable[[], Path], tmp_path: Path) -> None:
    store = copied()
    (tmp_path / "labels.csv").write_text(f'sae,feature,label\n{RES},3,"ends, of «sentences»"\n{RES},200,names\n')
    label(store, tmp_path / "labels.csv")
    with actstore.open(store) as changed:
        out = changed.export([RES], format="neuronpedia", out=tmp_path / "out").path
    found = lines(out, "explanations")
    assert all(list(line) == EXPLANATION_KEYS for line in found)
    assert [(line["index"], line["description"]) for line in found] == [("3", "ends, of «sentences»"), ("200", "names")]


def test_equal_stores_give_equal_bytes(written: Path, copied: Callable[[], Path], tmp_path: Path) -> None:
    store = copied()
    shutil.rmtree(store / "index")
    from actstore.maintenance import index

    index(store)
    with actstore.open(store) as again:
        out = again.export([RES], format="neuronpedia", out=tmp_path / "out").path
    assert digests(out) == digests(written)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
