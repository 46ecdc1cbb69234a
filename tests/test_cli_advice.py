"""What commands say next: what an interrupted run leaves, what completes a store, how to have again what is gone."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from asking_support import ATT, DATASET, MODEL, RES
from cli_support import EXECUTABLE, printed, run
from saes_support import write_saelens

import actstore
from actstore.advice import having_again, what_stays
from actstore.demo import assets
from actstore.errors import InvalidInput
from actstore.store import StoreReader

TEXTS = ["A short text about tea.", "Another one about the sea and a ship that leaves."]


def dataset(path: Path, n_documents: int, first: int = 0) -> Path:
    """Write a few documents of the embedded dataset."""
    lines = DATASET.read_text(encoding="utf-8").splitlines()[first : first + n_documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# What was dropped


def test_predictions_that_were_dropped_are_had_again_by_what_is_printed(copied: Callable[[], Path]) -> None:
    store = copied()
    question = "SELECT * FROM predictions ORDER BY row"
    with actstore.open(store) as opened:
        before = opened.sql(question).arrow()
    for _ in range(2):  # what was had again can be dropped again
        command = printed("drop", store, "predictions").partition("again: ")[2].strip()
        assert command == f"actstore extract MODEL --into {store} --predictions"
        words = shlex.split(command.replace("MODEL", str(MODEL)))[1:]
        printed(*words, "--dtype", "float32", "--device", "cpu")
    with actstore.open(store) as opened:
        assert opened.sql(question).arrow().equals(before)


def test_attention_and_predictions_make_a_store_alone(tmp_path: Path) -> None:
    for options in ({"predictions": True}, {"attention_top": 2, "predictions": False}):
        out = tmp_path / "-".join(options)
        assert actstore.extract(MODEL, TEXTS, out=out, device="cpu", **options).complete
        wanted = {"predictions"} if options["predictions"] else {f"attention/{layer}" for layer in range(6)}
        assert set(StoreReader(out).layout.artifacts) - {"corpus/tokens"} == wanted
    for options in ({"predictions": False}, {}):  # predictions come with what is asked for, not alone
        with pytest.raises(InvalidInput, match=r"predictions come with these\),\nor --predictions for them alone"):
            actstore.extract(MODEL, TEXTS, out=tmp_path / "x", device="cpu", **options)


@pytest.mark.parametrize(
    ("artifact", "command"),
    [
        ("sites/z.3", "actstore extract MODEL --into 's p' --site z.3"),
        ("firings/mine", "actstore extract MODEL --into 's p' --sae SOURCE"),
        ("lens/logit/resid_post.2", "actstore save-lens 's p' --site resid_post.2"),
        ("lens/tuned-1/resid_post.2", "actstore save-lens 's p' --tuned FOLDER --name tuned-1 --site resid_post.2"),
        ("attention/3", "actstore extract MODEL --into 's p' --attention-top K (all layers at once"),
    ],
)
def test_every_artifact_has_a_command(artifact: str, command: str) -> None:
    assert having_again("s p", artifact).startswith(command)


# What completes a store


@pytest.mark.slow
def test_after_documents_are_added_the_printed_commands_complete_every_pass(tmp_path: Path) -> None:
    store = tmp_path / "with space.act"
    first, second = dataset(tmp_path / "a.jsonl", 30), dataset(tmp_path / "b.jsonl", 12, first=30)
    begun = ["--site", "resid_post.*", "--site", "z.1", "--lens", 2, "--lens-site", "resid_post.5", "--device", "cpu"]
    extract = ["extract", MODEL, first, "--out", store, "--context", 32, "--shard-rows", 512, *begun]
    printed(*extract)
    printed("extract", MODEL, "--into", store, "--attention-top", 3, "--attention-min", 0.01, "--device", "cpu")
    printed("encode", store, "small=neurons:z.1", "--neurons-top", 8, "--encode-special", "--device", "cpu")
    printed("save-lens", store, "-k", 3, "--site", "resid_post.2", "--site", "resid_post.3", "--device", "cpu")
    said = printed(*extract, "--append", second)
    commands = [line.strip() for line in said.splitlines() if line.startswith("  actstore")]
    assert len(commands) == 3 and "These commands complete them:" in said
    for command in commands:
        printed(*shlex.split(command)[1:], "--device", "cpu")
    reader = StoreReader(store)
    assert len(reader.passes) == 4
    assert all(len(reader.receipts[one]) == reader.layout.n_shards for one in reader.passes)
    assert "complete them" not in printed(*extract, "--append", second)


# Runs that end early


@pytest.mark.slow
def test_ctrl_c_says_what_is_kept_and_the_same_command_resumes(tmp_path: Path) -> None:
    store = tmp_path / "x.act"
    command = [EXECUTABLE, "extract", MODEL, DATASET, "--out", store, "--site", "resid_post.*"]
    command += ["--shard-rows", "1024", "--max-tokens", "24000", "--device", "cpu"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(store.glob("passes/*/receipts/*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in said and "Aborted" not in said
    reader = StoreReader(store)
    (pass_id,) = reader.passes
    n_done, n_shards = len(reader.receipts[pass_id]), reader.layout.n_shards
    assert 0 < n_done < n_shards
    assert f"{n_done} of {n_shards} shards of pass {pass_id} are done and stay; the same command resumes." in said
    made = sum(reader.rows_used[shard] for shard in reader.receipts[pass_id])
    assert re.search(rf"^This run made {made} tokens: \d+ tokens/s, bound by [a-z-]+ \(", said, re.MULTILINE)
    assert f"last run: {said.partition('tokens: ')[2].strip()}" in printed("info", store)
    planned = printed(*command[1:], "--plan")
    assert f"Counted too is what is done: {n_done} of {n_shards} shards of pass {pass_id}; the command" in planned
    assert "Counted too" not in printed(
        "extract", MODEL, "--out", store, "--append", DATASET, "--site", "z.0", "--plan"
    )
    resumed = run(*command[1:])
    left = f"plan: {n_shards - n_done} shards with {reader.layout.n_rows - made} tokens are to be made, of "
    assert f"{left}{reader.layout.n_docs} documents in all: about " in resumed.stderr
    assert f"Made {n_shards - n_done} shards" in resumed.stdout
    assert "Counted too" not in printed(*command[1:], "--plan")
    assert "Every pass that was begun is complete" in what_stays(store)


def test_ctrl_c_says_how_the_run_went_that_had_ended_and_nothing_where_none_made_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("actstore.maintenance.index", interrupted)
    texts = dataset(tmp_path / "a.jsonl", 3)
    command = ["extract", MODEL, texts, "--out", tmp_path / "x.act", "--site", "z.0", "--device", "cpu"]
    first, second = run(*command), run(*command)
    assert (first.exit_code, second.exit_code) == (130, 130)
    report = r"This run made 106 tokens: \d+ tokens/s, bound by .*; peak memory \d+ MB"
    assert re.search(rf"Every pass .* stays.*\n{report}\n$", first.stderr)
    assert "Every pass" in second.stderr and "tokens/s" not in second.stderr


def test_what_stays_of_a_store_that_was_hardly_begun(tmp_path: Path) -> None:
    assert what_stays(tmp_path / "none") == "Nothing was stored yet."
    options = ["extract", MODEL, "--out", tmp_path / "s p", "--site", "z.0", "--device", "cpu"]
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    said = run(*options, tmp_path / "a.jsonl").stderr
    assert "No document has a token" in said and "s p' stays, still without text: the next command" in said
    said = run(*options, dataset(tmp_path / "b.jsonl", 3), "--lens", 5000).stderr
    assert "--lens 5000 is too many" in said and "stays" not in said  # it was there before
    assert "stays with the text of 3 documents" in what_stays(tmp_path / "s p")


# SAEs and their proof


def at_another_site(folder: Path, hook: str) -> Path:
    """Write the demo's SAE of resid_post.3 as SAELens does, with the name of another hook in its configuration."""
    path = next(one for one in assets().saes if one.parts[-4:-2] == ("gemma-scope-demo-res", "layer_3"))
    arrays = dict(np.load(path / "params.npz"))
    d_in, d_sae = arrays["W_enc"].shape
    changes = {"architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "apply_b_dec_to_input": False}
    return write_saelens(folder, arrays, **changes, metadata={"hook_name": hook})


@pytest.mark.slow
def test_a_site_as_asked_wins_over_the_configuration_and_is_proved(tmp_path: Path) -> None:
    """A configuration that is wrong does not stop what is right, and what is wrong does not pass for being asked."""
    folder, texts = at_another_site(tmp_path, "blocks.2.hook_resid_post"), dataset(tmp_path / "a.jsonl", 40)
    store = tmp_path / "x.act"
    options = ["extract", MODEL, texts, "--out", store, "--device", "cpu", "--no-predictions", "--sae"]
    refused = run(*options, f"mine={folder}")
    assert refused.exit_code == 1 and "resid_post.3 explains it better" in refused.stderr
    assert f"{store} stays with the text of 40 documents as tokens" in refused.stderr
    asked = run(*options, f"mine={folder}@resid_post.3")
    assert asked.exit_code == 0, asked.output
    assert "site resid_post.3 as asked; its path or cfg.json says resid_post.2" in asked.stderr
    with actstore.open(store) as opened:
        assert opened.sql("SELECT sae, site FROM saes").rows() == [{"sae": "mine", "site": "resid_post.3"}]
    wrong = run(*options, f"mine={folder}@resid_post.5")
    assert wrong.exit_code == 1 and "another recipe" in wrong.stderr


@pytest.mark.slow
def test_what_is_not_ok_is_said_last(tmp_path: Path) -> None:
    folder, texts = at_another_site(tmp_path, "blocks.2.hook_resid_post"), dataset(tmp_path / "a.jsonl", 40)
    options = ["extract", MODEL, texts, "--out", tmp_path / "x", "--sae", f"mine={folder}", "--device", "cpu"]
    last = printed(*options, "--allow-unhealthy").splitlines()[-3:]
    assert any("not ok, and recorded as such" in line for line in last)
    assert "resid_post.3 explains it better" in last[-1]
    assert [one["ok"] for one in json.loads(printed("query", tmp_path / "x", "health", "-p", "bad=true", "--json"))]


def test_a_recipe_that_differs_in_much_is_told_in_little(copied: Callable[[], Path]) -> None:
    store = copied()
    said = run("extract", MODEL, "--out", store, "--site", "z.2,3", "--sae", f"{RES}=neurons:z.1", "--device", "cpu")
    told = said.stderr.partition("stored → asked: ")[2].partition(". Next: ")[0].split("; ")
    assert f"sae {RES}: site resid_post.3 → z.1, width 256 → 96" in told and f"sae {ATT}: there → none" in told
    assert len(told) == 5 and told[-1].startswith("and ") and told[-1].endswith(" more")
    assert all(len(one) < 160 for one in told)
