"""`actstore extract`: its plan, its run, standard input, and that the same command resumes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from asking_support import DATASET, MODEL, RES, SmallStore
from cli_support import EXECUTABLE, printed, run


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
