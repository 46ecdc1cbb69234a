"""`actstore demo`: the embedded world, extracted and asked."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

import actstore

from .output import progress
from .passes import saying_what_stays

__all__ = ["demo"]


@click.command()
@click.argument("directory", default="demo.act", type=click.Path(path_type=Path))
def demo(directory: Path) -> None:
    """Extract the embedded model over the embedded dataset into DIRECTORY and print the three headline answers."""
    from actstore.demo import assets, demo_answers, extract_demo

    click.echo(
        f"Running the embedded model with {len(assets().saes)} SAEs over the embedded dataset into {directory} …"
    )
    with saying_what_stays(directory), progress() as report:
        outcome = extract_demo(directory, report)
    click.echo(f"{outcome.n_rows_made} tokens in {outcome.seconds:.1f} s. From here on, no model is needed.")
    if outcome.report is not None:
        click.echo(str(outcome.report))
    with actstore.open(directory) as store:
        for answer in demo_answers(store):
            click.secho(f"\n{answer.title}\n", bold=True)
            click.echo(answer.text)
            click.echo("\n" + "\n".join(f"  $ {command}" for command in answer.commands))
    where = shlex.quote(str(directory))
    click.echo(
        f"\nNext:\n  $ actstore info {where}\n  $ actstore queries\n"
        f"  $ actstore query {where} surprising_tokens -p k=10\n"
        f"  $ actstore sql {where} 'SHOW TABLES'"
    )
