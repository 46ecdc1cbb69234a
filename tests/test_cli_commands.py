"""Every command: what it says of itself, and what it does as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from asking_support import RES, SmallStore
from cli_support import COMMANDS, EXECUTABLE, printed, process, run

import actstore
from actstore.cli import main


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


# Processes


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
