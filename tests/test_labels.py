"""Labels of features: our own fields, and Neuronpedia's exported explanations matched to stored SAEs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asking_support import ATT, RES
from click.testing import CliRunner

import actstore
from actstore import maintenance
from actstore.cli import main
from actstore.errors import InvalidInput, MissingInput
from actstore.labels import read_labels

GEMMA = {"sae": "20-gemmascope-res-16k", "width": 100, "neuronpedia_id": "gemma-2-2b/20-gemmascope-res-16k"}
SPARSER = {"sae": "20-gemmascope-res-16k__l0-139", "width": 100, "neuronpedia_id": None}
SAES = [GEMMA, SPARSER]


def explanation(index: Any = "7", description: Any = "cats", **changes: Any) -> dict[str, Any]:
    """Return a row of an export, with fields that say nothing to us."""
    row = {"id": "cm1", "modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": index}
    return row | {"description": description, "explanationModelName": "gpt", "typeName": "np"} | changes


def written(path: Path, rows: list[Any]) -> Path:
    """Write rows as the file's ending says."""
    text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_explanations_are_of_the_sae_with_their_neuronpedia_id(tmp_path: Path, name: str) -> None:
    rows = [
        explanation("7", "cats"),
        explanation(8, "dogs \u00fc"),
        explanation("9", "by the source", layer=None, sourceId="20-gemmascope-res-16k"),
        explanation("7", "cats, said better"),
        explanation("10", ""),
        explanation("11", None),
        explanation("4", "another model", modelId="gemma-2-9b"),
        explanation("5", "another source", layer="21-gemmascope-res-16k"),
        explanation("6", "the same source", layer="21-gemmascope-res-16k"),
    ]
    found = read_labels(written(tmp_path / name, rows), SAES)
    sae = GEMMA["sae"]
    assert found.texts == {(sae, 7): "cats, said better", (sae, 8): "dogs \u00fc", (sae, 9): "by the source"}
    assert found.unknown == {"gemma-2-2b/21-gemmascope-res-16k": 2, "gemma-2-9b/20-gemmascope-res-16k": 1}
    assert found.n_empty == 2


def test_an_sae_that_neuronpedia_does_not_know_is_found_by_its_id(tmp_path: Path) -> None:
    rows = [explanation(3, "x", layer=SPARSER["sae"])]
    assert read_labels(written(tmp_path / "a.jsonl", rows), SAES).texts == {(SPARSER["sae"], 3): "x"}
    # The id of an SAE that has a neuronpedia_id is of that model alone.
    rows = [explanation(3, "x", modelId="other")]
    assert not read_labels(written(tmp_path / "a.jsonl", rows), SAES).texts


def test_a_json_object_may_hold_the_list(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"explanations": [explanation()]}))
    assert len(read_labels(tmp_path / "a.json", SAES).texts) == 1


def test_our_own_fields_may_stand_between(tmp_path: Path) -> None:
    rows = [{"sae": GEMMA["sae"], "feature": 1, "label": "mine"}, explanation(2, "theirs")]
    found = read_labels(written(tmp_path / "a.jsonl", rows), SAES)
    assert found.texts == {(GEMMA["sae"], 1): "mine", (GEMMA["sae"], 2): "theirs"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.jsonl", json.dumps(explanation("x")), r"a.jsonl:1: .* is not an explanation", id="index"),
        pytest.param("a.jsonl", json.dumps(explanation(layer=7)), r":1: .*modelId, layer or sourceId", id="layer"),
        pytest.param("a.jsonl", json.dumps({"modelId": "m", "index": 1}), r":1: .* is not an explanation", id="fields"),
        pytest.param("a.jsonl", json.dumps(explanation(1, "\ud800")), r":1: .* is not an explanation", id="surrogate"),
        pytest.param(
            "a.jsonl", json.dumps(explanation(100)), r":1: .* has no feature 100. Accepted: 0 to 99", id="range"
        ),
        pytest.param("a.json", json.dumps([explanation(), 3]), r"a.json:2: .* is not a label", id="a number"),
        pytest.param("a.json", json.dumps({"a": 1}), r'not a list of labels. Accepted: .*"explanations"', id="no list"),
        pytest.param("a.json", "{", r"not a list of labels", id="no JSON"),
        pytest.param("a.json", "[" * 200_000, r"not a list of labels", id="deep"),
        pytest.param("a.jsonl.gz", "no gzip", r"is not whole gzip", id="gzip"),
        pytest.param("a.csv", f"sae,feature,label\nx,1,{'y' * 200_000}\n", r"a.csv:2: .*131,072 characters", id="long"),
        pytest.param("a.csv", f"sae,{'y' * 200_000}\n", r"a.csv:1: .*no CSV", id="a long header"),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_their_place(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput, match=message):
        read_labels(tmp_path / name, SAES)


def test_gzip_that_is_damaged_inside_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl.gz", [explanation(str(number), f"label {number}") for number in range(100)])
    data = bytearray(path.read_bytes())
    data[20:60] = b"\xff" * 40
    path.write_bytes(data)

    with pytest.raises(InvalidInput, match="is not whole gzip"):
        read_labels(path, SAES)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="modelId, layer, index, description"):
        read_labels(tmp_path / "none.jsonl", SAES)


def test_the_command_names_features_and_says_what_it_left_out(copied: Callable[[], Path], tmp_path: Path) -> None:
    store = copied()
    rows = [
        explanation(9, "names", layer=RES),
        explanation(3, "tea", layer=ATT),
        explanation(1),
        explanation(2, "", layer=RES),
    ]
    result = CliRunner().invoke(main, ["label", str(store), str(written(tmp_path / "a.jsonl", rows))])
    assert result.exit_code == 0, result.output
    assert "2 features named" in result.stdout
    assert "left out: 1 explanations of gemma-2-2b/20-gemmascope-res-16k, which is not stored" in result.stderr
    assert "left out: 1 explanations without a description" in result.stderr
    with actstore.open(store) as opened:
        found = opened.sql("SELECT sae, feature, label FROM features WHERE label IS NOT NULL ORDER BY ALL").rows()
        assert {(one["sae"], one["feature"]): one["label"] for one in found} == {(RES, 9): "names", (ATT, 3): "tea"}
    assert maintenance.label(store, tmp_path / "a.jsonl") == 2
