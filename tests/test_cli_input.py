"""Values that cannot be: each is one message with what is there and what is accepted, and nothing is made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
from asking_support import RES, SmallStore
from cli_support import run


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["lens", "--doc", "3", "--first", "500"], ["Document 3 has no position from 500", "within 0 to "]),
        (["lens", "--doc", "3", "--first", "4", "--last", "2", "--json"], ["no position from 4 to 2"]),
        (["fit-lens", "--site", "z.2", "--out", "x"], ["a lens is fitted to: 'z.2'", "resid_pre.0, resid_post.0"]),
        (["fit-lens", "--held-out", "1", "--out", "x"], ["held out is 1.0", "above 0 and below 1"]),
        (["fit-lens", "--held-out", "0", "--out", "x"], ["held out is 0.0", "--held-out 0.1"]),
        (["export", RES, "--format", "anndata", "--by", "document", "--out", "x.h5ad"], ["add --reduce max"]),
        (["export", RES, "--format", "anndata", "--reduce", "max", "--out", "x.h5ad"], ["add --by document"]),
        (["sql", "SELECT 1", "--output", "x.xlsx"], ["x.xlsx does not say a format", ".json", "--format"]),
        (["query", "health", "--output", "x"], ["does not say a format"]),
        (["query", "dead_features", "-p", f"sae={RES}", "-p", "most=-1"], ["'most' is '-1'", "amount from 0"]),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_message(
    small: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], messages: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    result = run(command, small.path, *rest)
    assert result.exit_code == 1 and len(result.stderr.strip().splitlines()) == 1, result.output
    assert all(one in result.stderr for one in messages), result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--lens", "--attention-top"])
def test_nothing_kept_is_no_number(small: SmallStore, option: str) -> None:
    result = run("extract", "model", "--into", small.path, option, "0")
    assert result.exit_code == 2 and f"'{option}': 0 is not in the range x>=1" in result.stderr


@pytest.mark.parametrize("ending", ["json", "csv", "parquet", "txt"])
def test_a_file_has_the_format_of_its_ending(small: SmallStore, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"answer.{ending}"
    assert run("sql", small.path, "SELECT 41 + 1 AS answer", "--output", out).exit_code == 0
    if ending == "parquet":
        assert pyarrow.parquet.read_table(out).to_pylist() == [{"answer": 42}]
    elif ending == "json":
        assert json.loads(out.read_text()) == [{"answer": 42}]
    else:
        assert out.read_text().split() == (['"answer"', "42"] if ending == "csv" else ["answer", "──────", "42"])
    assert run("sql", small.path, "SELECT 1 AS one", "--output", out, "--format", "json").exit_code == 0
    assert json.loads(out.read_text()) == [{"one": 1}]  # what is said wins


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "feature,label\n", "a.csv:1: the columns are feature, label. Accepted: "),
        ("a.csv", f"sae;feature;label\n{RES};1;x\n", "a.csv:1: the columns are sae;feature;label"),
        ("a.csv", "sae,feature,label\n", "a.csv has no row"),
        ("a.jsonl", "", "a.jsonl has no row"),
        ("a.json", "[]", "a.json has no row"),
    ],
)
def test_labels_that_name_nothing_are_an_error(
    copied: Callable[[], Path], tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    store = copied()
    result = run("label", store, tmp_path / name)
    assert result.exit_code == 1 and message in result.stderr and "sae, feature, label" in result.stderr
    assert not (store / "labels.json").exists()


LEFT_OPEN = """
import actstore
store = actstore.open({path!r})
connection = store.connect()
kept = []
for ask in (store.sql, connection.execute):
    try:
        ask("SELECT act('z.99', 1)")
    except Exception as error:
        kept.append(error)
assert len(kept) == 2
"""


def test_a_store_that_is_left_open_says_nothing_at_the_end(small: SmallStore) -> None:
    """An error of a function, held until the end, holds the connection; DuckDB would list it as leaked."""
    program = LEFT_OPEN.format(path=str(small.path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_windows_beyond_the_positions_of_a_model_are_a_warning(tmp_path: Path) -> None:
    from asking_support import MODEL

    limit = json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]
    (tmp_path / "a.txt").write_text("A tea.\nAnother line, of the same document.\n")
    options = ["extract", MODEL, tmp_path / "a.txt", "--out", tmp_path / "x", "--site", "z.0", "--plan", "--json"]
    for context, warned in ((limit, False), (limit + 1, True)):
        result = run(*options, "--context", context)
        assert result.exit_code == 0 and json.loads(result.stdout)["n_documents"] == 1
        assert (f"is made for {limit} positions" in result.stderr) == warned
