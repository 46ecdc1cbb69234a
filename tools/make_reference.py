"""Write docs/reference.md from the program itself: commands, named queries, SQL tables and functions, settings.

python tools/make_reference.py          a test fails where the page is not what this writes
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from actstore.cli import main as commands
from actstore.index import TABLES
from actstore.lenses import Functions
from actstore.named import load_queries
from actstore.settings import SETTINGS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"


def reference() -> str:
    """Return the page."""
    parts = ["# Reference", "Written by `python tools/make_reference.py`; do not edit.", *_commands(), *_queries()]
    return "\n\n".join([*parts, *_tables(), *_functions(), *_settings()]) + "\n"


def _commands() -> Iterator[str]:
    yield "## Commands"
    group = click.Context(commands, info_name="actstore", terminal_width=110, **commands.context_settings)
    for name, command in commands.commands.items():
        context = click.Context(command, parent=group, info_name=name, terminal_width=110)
        yield f"### actstore {name}\n\n```text\n{command.get_help(context)}\n```"


def _queries() -> Iterator[str]:
    yield "## Named queries"
    for query in load_queries().values():
        lines = [f"### {query.name}", "", query.summary, "", query.text, ""]
        lines += ["| parameter | type | default | |", "|---|---|---|---|"]
        lines += [
            f"| {one.name} | {one.kind} | {'needed' if one.required else one.default} | {one.help} |"
            for one in query.parameters
        ]
        lines += [f"\nNeeds `{table}`: {remedy}." for table, remedy in query.needs]
        yield "\n".join(lines)


def _tables() -> Iterator[str]:
    yield "## SQL tables"
    for table, columns in TABLES.items():
        listed = ", ".join(f"`{name}` {kind}" for name, kind in columns.items())
        yield f"**{table}**: {listed}"


def _functions() -> Iterator[str]:
    yield "## SQL functions"
    for function in Functions(None).all():  # type: ignore[arg-type]  # only declared here, never called
        summary = (function.function.__doc__ or "").split("\n")[0]
        yield f"**{function.name}**({', '.join(function.parameters)}) → {function.returns}: {summary}"


def _settings() -> Iterator[str]:
    yield "## Settings (environment)"
    for setting in SETTINGS.values():
        yield f"**{setting.name}** (default `{setting.default}`): {setting.help}"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(PAGE)
