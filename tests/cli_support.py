"""Commands run as a user runs them, in this process or in one of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from actstore.cli import main

__all__ = ["COMMANDS", "EXECUTABLE", "failure", "printed", "process", "run"]


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


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([EXECUTABLE, *map(str, arguments)], capture_output=True, text=True, check=False)
