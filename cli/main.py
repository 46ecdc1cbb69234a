"""The group of all commands, and the one place where errors become messages."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from actstore import __version__
from actstore.errors import ActstoreError, explain

from .ask import info, lens, queries, query, sql, stats, top
from .demo import demo
from .export import export
from .extract import extract
from .fit import fit_lens
from .keep import drop, gc, index, label, verify
from .passes import encode, save_lens

__all__ = ["main"]


class _Commands(click.Group):
    """Commands in the order of use; what actstore raises on purpose is a message and exit status 1, no traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        try:
            return super().main(args, *rest, **options)
        except ActstoreError as error:
            click.secho(f"Error: {error}", fg="red", err=True)
            for note in getattr(error, "__notes__", ()):
                click.echo(note, err=True)
            sys.exit(1)
        except OSError as error:
            click.secho(f"Error: {_told(error)}", fg="red", err=True)
            sys.exit(1)


def _told(error: OSError) -> str:
    """Return what the system said of a file, as our own messages are made."""
    where = f"{error.filename}: " if error.filename else ""
    return explain(f"{where}{error.strerror or error}", next_step="check the path and its permissions")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Run a language model over a dataset once; ask what happened inside it for ever, without model or GPU."""


for command in (
    demo,
    extract,
    encode,
    save_lens,
    info,
    sql,
    query,
    queries,
    lens,
    top,
    stats,
    index,
    verify,
    gc,
    drop,
    label,
    export,
    fit_lens,
):
    main.add_command(command)
