"""Every command: what it prints for people and for programs, and how it fails."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from asking_support import ATT, DATASET, MODEL, RES, SmallStore
from click.testing import CliRunner, Result

import actstore
from actstore.api import Store
from actstore.cli import main
from actstore.named import load_queries

EXECUTABLE = Path(sys.executable).parent / "actstore"
COMMANDS = list(main.commands)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def printed(*arguments: object) -> str:
    """Return what a command that succeeds prints."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def failure(*arguments: object) -> str:
    """Return the message of a command that fails as failures should: status 1, one message, no traceback."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    return result.stderr.removeprefix("Error: ")


# Help


def test_the_commands_are_those_of_the_contract() -> None:
    wanted = {
        "demo",
        "extract",
        "encode",
        "save-lens",
        "index",
        "verify",
        "info",
        "gc",
        "drop",
        "label",
        "sql",
        "query",
        "queries",
    }
    assert wanted | {"lens", "top", "stats"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does(command: str) -> None:
    shown = printed(command, "--help")
    assert shown.startswith(f"Usage: main {command}")
    assert len(shown.splitlines()[2].strip()) > 20
    for option in main.commands[command].params:
        if option.param_type_name == "option" and not option.help:
            raise AssertionError(f"{command} {option.name} has no help")


def test_help_of_all_and_version() -> None:
    assert all(f"  {command}" in printed("--help") for command in COMMANDS)
    assert actstore.__version__ in printed("--version")


def test_a_wrong_command_line_is_status_two() -> None:
    for arguments in (["nosuch"], ["sql"], ["query", "x", "--nosuch"], ["sql", "x", "y", "--format", "xml"]):
        assert run(*arguments).exit_code == 2


# Answers


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


def test_standard_input_is_read_once(tmp_path: Path) -> None:
    store = tmp_path / "piped.act"
    command = [str(EXECUTABLE), "extract", str(MODEL), "-", "--out", str(store)]
    line = json.dumps({"text": "Nina likes tea."}) + "\n"
    options = ["--site", "resid_post.1", "--no-predictions", "--device", "cpu"]
    for text in (line, line):  # the second time it is compared with what is stored
        done = subprocess.run([*command, *options], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    other = subprocess.run([*command, *options], input=line * 2, capture_output=True, text=True, check=False)
    assert other.returncode == 1 and "another recipe" in other.stderr


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


# Keeping


def test_drop_frees_space_and_the_store_stays_whole(copied: Callable[[], Path]) -> None:
    store = copied()
    before = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    for artifact, name in (
        ("z.3", "sites/z.3"),
        (ATT, f"firings/{ATT}"),
        ("blocks.0.hook_resid_pre", "sites/resid_pre.0"),
    ):
        assert printed("drop", store, artifact).startswith(f"{name} is gone")
        assert "artifact" in failure("drop", store, artifact)
    assert not (store / "arrays/sites/z.3").exists() and not (store / f"firings/{ATT}").exists()
    assert sum(path.stat().st_size for path in store.rglob("*") if path.is_file()) < before
    assert json.loads(printed("verify", store, "--json"))["faults"] == []
    assert json.loads(printed("sql", store, "SELECT sae FROM saes", "--json")) == [{"sae": RES}]


def test_verify_names_every_fault_and_fails(copied: Callable[[], Path]) -> None:
    store = copied()
    damaged = [
        store / "arrays/sites/z.2/c.1.0",
        store / f"firings/{RES}/0.zip",
        next((store / "index").glob("*.duckdb")),
    ]
    for path in damaged:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    result = run("verify", store)
    assert result.exit_code == 1
    assert all(path.name in result.stdout for path in damaged)
    faults = json.loads(run("verify", store, "--json").stdout)
    assert not faults["ok"] and len(faults["faults"]) >= 3


def test_gc_removes_what_nothing_names(copied: Callable[[], Path]) -> None:
    store = copied()
    (store / "arrays/sites/z.2/c.9.0").write_bytes(b"left over")
    (store / "index/features-dead.duckdb").write_bytes(b"left over")
    assert "orphan" in printed("verify", store)
    assert "removed" in printed("gc", store)
    assert "orphan" not in printed("verify", store)
    assert not (store / "arrays/sites/z.2/c.9.0").exists()


def labels(store: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        printed("sql", store, "SELECT sae, feature, label FROM features WHERE label IS NOT NULL ORDER BY ALL", "--json")
    )
    return found


def test_labels_are_added_and_replaced(copied: Callable[[], Path], tmp_path: Path) -> None:
    store = copied()
    (tmp_path / "a.csv").write_text(f'sae,feature,label\n{RES},9,"is, after a name"\n{ATT},3,\u00fcber\n')
    assert printed("label", store, tmp_path / "a.csv").startswith("2 features named")
    (tmp_path / "b.jsonl").write_text(json.dumps({"sae": RES, "feature": 9, "label": "new\nline"}) + "\n\n")
    printed("label", store, tmp_path / "b.jsonl")
    expected = [{"sae": ATT, "feature": 3, "label": "\u00fcber"}, {"sae": RES, "feature": 9, "label": "new\nline"}]
    assert labels(store) == expected
    assert "new⏎line" in printed("stats", store, RES, "--feature", 9)
    assert json.loads(printed("verify", store, "--json"))["faults"] == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", f"sae,feature\n{RES},1\n", ":1: "),
        ("a.csv", f"sae,feature,label\n{RES},1\n", ":2: "),
        ("a.csv", f"sae,feature,label\n{RES},1,good\n{RES},256,bad\n", ":3: "),
        ("a.csv", f"sae,feature,label\n{RES},-1,bad\n", "0 to 255"),
        ("a.csv", "sae,feature,label\nnosuch,1,bad\n", "SAE 'nosuch'"),
        ("a.jsonl", json.dumps({"sae": RES, "feature": 1.5, "label": "x"}), ":1: "),
        ("a.jsonl", json.dumps({"sae": RES, "feature": 1, "label": None}), ":1: "),
        ("a.jsonl", "not json", ":1: "),
        ("a.jsonl", b"\xff\xfe", "UTF-8"),
    ],
)
def test_labels_that_do_not_fit_change_nothing(
    copied: Callable[[], Path], tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    store = copied()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in failure("label", store, tmp_path / name)
    assert not (store / "labels.json").exists()
    assert "no file" in failure("label", store, tmp_path / "none.csv")


# Extraction


def test_extract_plans_runs_and_resumes(tmp_path: Path) -> None:
    out = tmp_path / "made.act"
    options = ["--site", "resid_post.1", "--site", "z.0", "--lens", 2, "--context", 64, "--shard-rows", 256]
    options += ["--max-tokens", 700, "--dtype", "float32", "--device", "cpu"]
    plan = json.loads(printed("extract", MODEL, DATASET, "--out", out, *options, "--plan", "--json"))
    assert not out.exists()
    shown = printed("extract", MODEL, DATASET, "--out", out, *options, "--plan")
    assert f"{plan['n_rows']} tokens, {plan['n_shards']} shards" in shown and "free on the disk" in shown
    result = run("extract", MODEL, DATASET, "--out", out, *options, "--json")
    assert result.exit_code == 0, result.output
    outcome = json.loads(result.stdout)
    assert (outcome["complete"], outcome["n_shards_made"], outcome["n_rows_made"]) == (
        True,
        plan["n_shards"],
        plan["n_rows"],
    )
    assert "tokenising: " in result.stderr and "extracting: " in result.stderr and "\x1b" not in result.stderr
    described = json.loads(printed("info", out, "--json"))
    assert described["corpus"]["documents"] == plan["n_documents"]
    for artifact in ("sites/resid_post.1", "sites/z.0"):  # planned uncompressed; random-like floats shrink little
        assert 0.5 * plan["artifacts"][artifact] < described["n_bytes"][artifact] < 1.6 * plan["artifacts"][artifact]
    assert 0.5 * plan["kit_bytes"] < described["n_bytes"]["kit"] < 1.5 * plan["kit_bytes"]
    again = run("extract", MODEL, DATASET, "--out", out, *options)
    assert again.exit_code == 0 and "is complete. Made 0 shards" in again.stdout


def test_a_plan_needs_no_weights(small: SmallStore, tmp_path: Path) -> None:
    bare = tmp_path / "model"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, bare / name)
    plan = json.loads(
        printed("extract", bare, DATASET, "--out", tmp_path / "x", "--sae", small.sae_folders[RES], "--plan", "--json")
    )
    n_rows = plan["n_rows"]
    assert plan["n_documents"] == 2600 and n_rows > 100_000
    assert plan["artifacts"][f"firings/{RES}"] == pytest.approx(n_rows * (13 * 3.5 + 3 * 4), rel=0.01)
    assert plan["total_bytes"] == sum(plan["artifacts"].values()) + plan["index_bytes"] + plan["kit_bytes"]


# Processes


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([EXECUTABLE, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_a_real_process_answers_and_fails(small: SmallStore, tmp_path: Path) -> None:
    answered = process("sql", small.path, "SELECT 1 AS one", "--json")
    assert (answered.returncode, json.loads(answered.stdout), answered.stderr) == (0, [{"one": 1}], "")
    failed = process("sql", tmp_path / "none", "SELECT 1")
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.startswith("Error: ") and "Traceback" not in failed.stderr


def test_a_closed_pipe_is_no_accident(small: SmallStore) -> None:
    question = "SELECT * FROM activations"
    command = f"{EXECUTABLE} sql {small.path} '{question}' --limit 1000000 --format csv | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith('"sae"') and done.stderr == ""


LIGHT = """
import runpy, sys
sys.argv = ["actstore", *{arguments!r}]
try:
    from actstore.cli import main
    main()
except SystemExit as done:
    assert not done.code, done.code
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""


@pytest.mark.parametrize(
    "arguments",
    [["lens", "--doc", "3"], ["index"], ["verify"], ["info", "--json"], ["top", RES, "9"]],
    ids=lambda arguments: arguments[0],
)
def test_commands_import_neither_torch_nor_transformers(copied: Callable[[], Path], arguments: list[str]) -> None:
    command, *rest = arguments
    program = LIGHT.format(arguments=[command, str(copied()), *rest])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
