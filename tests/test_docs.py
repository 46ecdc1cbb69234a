"""The documentation says what the program is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import click
import pytest

from actstore.cli import main as commands
from actstore.named import NamedQuery, load_queries

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "world" / "README.md"])


def reference_program() -> ModuleType:
    """Return tools/make_reference.py as a module."""
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "tools" / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_page_is_what_the_program_says_of_itself() -> None:
    program = reference_program()
    assert program.PAGE.read_text(encoding="utf-8") == program.reference(), "run: python tools/make_reference.py"


@pytest.mark.parametrize("name", commands.commands)
def test_every_command_and_option_has_help(name: str) -> None:
    command = commands.commands[name]
    assert command.help
    for parameter in command.params:
        assert not isinstance(parameter, click.Option) or parameter.help, (name, parameter.name)


@pytest.mark.parametrize("query", load_queries().values(), ids=lambda query: query.name)
def test_every_query_is_documented_by_its_own_comment(query: NamedQuery) -> None:
    assert query.summary.endswith((".", "?")) and len(query.text) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_only_commands_queries_and_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    called = set(re.findall(r"(?:^|\$ |`)actstore ([a-z-]+)\b", text, flags=re.MULTILINE))
    assert called <= set(commands.commands), called - set(commands.commands)
    asked = set(re.findall(r"actstore query \S+ ([a-z_]+)", text))
    assert asked <= set(load_queries()), asked - set(load_queries())
    linked = {link for link in re.findall(r"\]\(([\w./-]+)\)", text) if not link.startswith("http")}
    assert all((page.parent / link).exists() for link in linked), linked
