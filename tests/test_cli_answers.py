"""Commands that ask: what they print for people and for programs, and how they fail."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from asking_support import ATT, RES, SmallStore
from cli_support import EXECUTABLE, failure, printed, run

from actstore.api import Store
from actstore.named import load_queries


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["sql", "SELECT *, 0.0 / 0.0 AS nothing, 1e400 AS more FROM documents LIMIT 3"],
        ["query", "max_activating", "-p", f"sae={RES}", "-p", "feature=9"],
        ["query", "document_features", "-p", f"sae={RES}", "-p", "doc=5"],
        ["lens", "--doc", "3"],
        ["lens", "--doc", "3", "-k", "3"],
        ["top", RES, "9", "--per-document", "1"],
        ["stats", ATT],
        ["stats", ATT, "--feature", "3"],
        ["verify"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_json_is_json_and_text_is_text(small: SmallStore, arguments: list[str]) -> None:
    command, *rest = arguments
    value = json.loads(printed(command, small.path, *rest, "--json"), parse_constant=lambda name: pytest.fail(name))
    assert value
    text = printed(command, small.path, *rest)
    assert text.strip() and not text.startswith(("{", "["))


def test_json_of_commands_that_change_a_store(copied: Callable[[], Path]) -> None:
    store = copied()
    assert json.loads(printed("index", store, "--json"))["n_parts"] > 5
    assert json.loads(printed("gc", store, "--json")) == []
    assert {one["name"] for one in json.loads(printed("queries", "--json"))} == set(load_queries())


QUESTION = "SELECT row, token, char_start, is_special, snippet(row, 2, 2) AS example FROM tokens ORDER BY row LIMIT 60"


@pytest.mark.parametrize("to_file", [False, True], ids=["printed", "to a file"])
@pytest.mark.parametrize("form", ["json", "csv", "parquet", "arrow"])
def test_every_format_reads_back(small: SmallStore, opened: Store, tmp_path: Path, form: str, to_file: bool) -> None:
    expected = opened.sql(QUESTION)
    target = ["--output", tmp_path / "answer"] if to_file else []
    result = run("sql", small.path, QUESTION, "--format", form, *target)
    assert result.exit_code == 0, result.output
    data = (tmp_path / "answer").read_bytes() if to_file else result.stdout_bytes
    if form == "json":
        assert json.loads(data) == expected.rows()
    elif form == "csv":
        rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
        assert [row["token"] for row in rows] == [row["token"] for row in expected.rows()]
        assert [int(row["row"]) for row in rows] == [row["row"] for row in expected.rows()]
    elif form == "parquet":
        assert pa.parquet.read_table(io.BytesIO(data)).to_pylist() == expected.rows()
    else:
        assert pa.ipc.open_stream(data).read_all().to_pylist() == expected.rows()


def test_nested_values_in_csv_are_json(small: SmallStore) -> None:
    question = (
        f"SELECT firings('{RES}', row) AS fired, [1, NULL] AS list, NULL AS nothing FROM tokens WHERE pos = 2 LIMIT 4"
    )
    rows = list(csv.DictReader(io.StringIO(printed("sql", small.path, question, "--format", "csv"))))
    assert all(isinstance(json.loads(row["fired"]), list) and json.loads(row["list"]) == [1, None] for row in rows)


def test_a_limit_is_said(small: SmallStore) -> None:
    result = run("sql", small.path, "SELECT row FROM tokens", "--limit", 5, "--json")
    assert len(json.loads(result.stdout)) == 5
    assert "there are more: raise --limit" in result.stderr
    assert "(5 rows shown, there are more)" in printed("sql", small.path, "SELECT row FROM tokens", "--limit", 5)


def test_the_lens_is_a_picture(small: SmallStore) -> None:
    lines = printed("lens", small.path, "--doc", 2, "--last", 3).splitlines()
    assert lines[0].split()[:2] == ["input", "<bos>"]
    assert [line.split()[0] for line in lines[1:-1]] == [f"resid_post.{layer}" for layer in range(5, -1, -1)]
    assert "probability" in lines[-1]
    assert len({len(line.rstrip()) // 40 for line in lines[1:-1]}) == 1  # one column per position
    assert "resid_mid.3" in printed("lens", small.path, "--doc", 2, "--sites", "*")


def test_the_lens_as_a_table_is_cut_to_the_positions_asked_for(small: SmallStore) -> None:
    shown = json.loads(printed("lens", small.path, "--doc", 4, "-k", 2, "--first", 2, "--last", 3, "--json"))
    assert {row["pos"] for row in (shown["rows"] if isinstance(shown, dict) else shown)} == {2, 3}


def test_queries_are_documented(small: SmallStore) -> None:
    listed = printed("queries")
    for name, query in load_queries().items():
        assert f"{name}: {query.summary}" in listed
        assert query.sql.splitlines()[0] in printed("queries", name)
        assert all(parameter.help for parameter in query.parameters)
    assert "Did you mean 'feature_stats'" in failure("queries", "feature_stat")


def test_info_shows_sizes_and_what_is_not_ok(small: SmallStore) -> None:
    shown = printed("info", small.path)
    for expected in (
        "5 of 5 shards",
        f"firings/{RES}",
        "sites/resid_post.5",
        "kit",
        "index catalog-",
        "NOT OK: sae_fvu",
    ):
        assert expected in shown
    values = re.findall(r"^  (?:NOT OK|not proved): .* is (\S+), expected", shown, re.MULTILINE)
    assert values and all(value == f"{float(value):.4g}" for value in values)  # four significant digits
    sizes = json.loads(printed("info", small.path, "--json"))["n_bytes"]
    on_disk = sum(path.stat().st_size for path in (small.path / "arrays/sites/z.2").glob("c.*"))
    assert sizes["sites/z.2"] == on_disk
    assert sizes["index"] == sum(path.stat().st_size for path in (small.path / "index").glob("*.duckdb"))


# Failures


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sql", "SELECT * FROM nosuch"], "nosuch"),
        (["sql", "SELECT nosuch FROM tokens"], "nosuch"),
        (["sql", "SELEC 1"], "syntax"),
        (["sql", "CREATE TABLE x (a INT)"], ""),
        (["sql", "SELECT act('nosuch.1', 1)"], "stored site 'nosuch.1'"),
        (["query", "nosuch"], "query 'nosuch'"),
        (["query", "max_activating", "-p", "sae"], "-p key=value"),
        (["query", "max_activating", "-p", f"sae={RES}"], "needs feature"),
        (["query", "max_activating", "-p", f"sae={RES}", "-p", "feature=x"], "'feature' is 'x'"),
        (["top", "nosuch", "1"], RES),
        (["top", RES, "100000"], "0 to 255"),
        (["lens", "--doc", "4000"], "documents 0 to"),
        (["drop", "nosuch"], "artifact 'nosuch'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_question_is_one_message(small: SmallStore, arguments: list[str], message: str) -> None:
    command, *rest = arguments
    shown = failure(command, small.path, *rest)
    assert message in shown
    assert len(shown.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "command", ["sql", "query", "info", "lens", "top", "stats", "index", "verify", "gc", "drop", "label"]
)
def test_where_there_is_no_store(tmp_path: Path, command: str) -> None:
    rest = {"sql": ["SELECT 1"], "query": ["logit_lens"], "lens": ["--doc", "0"], "top": ["a", "1"], "stats": ["a"]}
    rest |= {"drop": ["z.1"], "label": [str(tmp_path / "labels.csv")]}
    assert "There is no store at" in failure(command, tmp_path / "none", *rest.get(command, []))
    assert not (tmp_path / "none").exists()


def test_before_an_index_is_built(copied: Callable[[], Path]) -> None:
    store = copied()
    shutil.rmtree(store / "index")
    assert f"actstore index {store}" in failure("sql", store, "SELECT 1")
    assert "no index yet" in printed("info", store)
    printed("index", store)
    assert json.loads(printed("sql", store, "SELECT 41 + 1 AS answer", "--json")) == [{"answer": 42}]


def test_a_binary_format_is_not_printed_on_a_terminal(small: SmallStore) -> None:
    master, terminal = os.openpty()
    command = [str(EXECUTABLE), "sql", str(small.path), "SELECT 1", "--format", "parquet"]
    done = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, text=True, check=False)
    os.close(master)
    os.close(terminal)
    assert done.returncode == 1 and "parquet is not for a terminal" in done.stderr
