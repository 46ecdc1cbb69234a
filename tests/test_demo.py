"""`actstore demo`: what a new user sees first, and that every command that it shows can be pasted."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import actstore
from actstore.demo import assets, demo_answers
from actstore.maintenance import verify

PROGRAM = str(Path(sys.executable).parent / "actstore")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def printed(home: Path) -> str:
    """Run the demo as a user does, and return what it prints."""
    ran = subprocess.run([PROGRAM, "demo", "demo.act"], cwd=home, capture_output=True, text=True, check=True)
    assert "Traceback" not in ran.stderr and "Warning" not in ran.stderr
    return ran.stdout


def test_it_prints_three_answers_and_what_to_type_next(printed: str) -> None:
    assert [title[0] for title in re.findall(r"^\d\. .*", printed, flags=re.MULTILINE)] == ["1", "2", "3"]
    assert "\nNext:\n" in printed


def test_it_says_how_the_run_went(printed: str) -> None:
    assert re.search(r"^\d+ tokens/s, bound by .*; peak memory \d+ MB$", printed.splitlines()[2])


def test_every_command_that_it_shows_can_be_pasted(home: Path, printed: str) -> None:
    commands = re.findall(r"^  \$ (actstore .*)$", printed, flags=re.MULTILINE)
    assert len(commands) >= 9
    for command in commands:
        words = [PROGRAM, *shlex.split(command)[1:]]
        ran = subprocess.run(words, cwd=home, capture_output=True, text=True)
        assert ran.returncode == 0 and ran.stdout.strip() and not ran.stderr, (command, ran.stderr)


def test_the_answer_of_the_lens_turns_from_vague_to_right(home: Path, printed: str) -> None:
    answer = assets().guide["lens"]["answer"]
    with actstore.open(home / "demo.act") as store:
        rows = store.query("lens_trajectory", {"doc": 0}).rows()
    last = [row for row in rows if row["pos"] == max(one["pos"] for one in rows)]
    assert last[-1]["top_token"] == answer == last[-1]["final_token"]
    assert last[0]["top_token"] != answer and last[0]["kl_to_final"] > 1 and abs(last[-1]["kl_to_final"]) < 1e-5
    assert 3 <= last[-1]["leads_from"] <= 5


def test_the_examples_of_the_feature_are_what_its_meaning_says(home: Path, printed: str) -> None:
    """The shown feature fires on names that stood before in the same document."""
    shown = assets().guide["features"][0]
    with actstore.open(home / "demo.act") as store:
        examples = store.query(
            "max_activating", {"sae": assets().sae_id(shown["sae"]), "feature": shown["feature"], "k": 50}
        ).rows()
        assert shown["question"] == "repeated name" and len(examples) == 50
        for example in examples:
            text = store.sql("SELECT text FROM documents WHERE doc = ?", [example["doc"]]).scalar()
            assert text.count(example["token"].strip()) > 1, example


def test_the_sae_proofs_are_in_the_store_and_hold(home: Path, printed: str) -> None:
    with actstore.open(home / "demo.act") as store:
        failed = store.sql("SELECT * FROM health WHERE ok IS NOT TRUE").rows()
        assert failed == []
        fvus = store.sql("SELECT value FROM health WHERE name = 'sae_fvu'").rows()
        assert len(fvus) == len(assets().saes) and all(row["value"] < 0.1 for row in fvus)
        assert [answer.title[0] for answer in demo_answers(store)] == ["1", "2", "3"]


def test_every_byte_of_the_demo_is_proved_and_it_resumes_to_nothing(home: Path, printed: str) -> None:
    assert verify(home / "demo.act").ok
    again = subprocess.run([PROGRAM, "demo", "demo.act"], cwd=home, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines()[1].startswith("0 tokens in 0.0 s")
