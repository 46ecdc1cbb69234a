"""Keeping a store: index, verify, gc, drop, label."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from actstore import maintenance
from actstore.advice import completing, having_again
from actstore.repair import repair as repair_store
from actstore.store import GivenUp, Verification

from .output import bytes_text, json_option, print_json, progress

__all__ = ["drop", "gc", "index", "label", "verify"]

store_path = click.argument("store", type=click.Path(path_type=Path))


@click.command()
@store_path
@click.option(
    "--memory", "memory_gb", type=click.FloatRange(min=0.25), default=2.0, show_default=True, help="GB at most."
)
@json_option
def index(store: Path, memory_gb: float, as_json: bool) -> None:
    """Build or extend the index of STORE; may run while an extraction does, over the shards that are done."""
    with progress() as report:
        catalog = maintenance.index(store, report, memory_bytes=int(memory_gb * (1 << 30)))
    n_bytes = sum(part.n_bytes for part in catalog.parts)
    if as_json:
        print_json({"catalog": catalog.name, "n_parts": len(catalog.parts), "n_bytes": n_bytes})
    else:
        click.echo(f"{catalog.name}: {len(catalog.parts)} parts, {bytes_text(n_bytes)}")


@click.command()
@store_path
@click.option(
    "--repair",
    is_flag=True,
    help="Give up damaged shards, to be made again by what made them, and make damaged parts of the index anew.",
)
@json_option
def verify(store: Path, repair: bool, as_json: bool) -> None:
    """Prove every byte of STORE; names all faults at once. Exit status 1 where there are any (left)."""
    with progress() as report:
        mended = repair_store(store, report) if repair else None
        found = mended.left if mended else maintenance.verify(store, report)
    given_up = mended.given_up if mended else []
    if as_json:
        told = {"given_up": [vars(one) for one in given_up]} if repair else {}
        print_json({"ok": found.ok, **vars(found), **told})
    else:
        _print_given_up(store, given_up)
        _print_verification(store, found, repair)
    sys.exit(0 if found.ok else 1)


def _print_given_up(store: Path, given_up: Sequence[GivenUp]) -> None:
    for one in given_up:
        for shard, files in one.shards.items():
            click.echo(f"given up: shard {shard} of pass {one.pass_id}, damaged in {', '.join(files)}")
    for command in completing(store, [one.pass_id for one in given_up]):
        click.echo(f"to make them again: {command}")


def _print_verification(store: Path, found: Verification, repaired: bool) -> None:
    for fault in found.faults:
        click.secho(f"fault: {fault}", fg="red")
    for orphan in found.orphans:
        click.echo(f"orphan: {orphan} (actstore gc removes it)")
    faults = "1 fault" if len(found.faults) == 1 else f"{len(found.faults)} faults"
    verdict = "all as it was written" if found.ok else faults
    click.echo(f"{found.n_files} files, {bytes_text(found.n_bytes)}: {verdict}")
    if found.faults and not repaired:
        click.echo(f"Next: actstore verify {shlex.quote(str(store))} --repair")
    elif found.faults:
        click.echo("What is left is not made shard by shard: drop what it belongs to, or extract into a new store.")


@click.command()
@store_path
@json_option
def gc(store: Path, as_json: bool) -> None:
    """Remove from STORE what nothing names: unfinished files, dead claims, parts of old catalogs."""
    removed = maintenance.collect_garbage(store)
    if as_json:
        print_json(removed)
    else:
        click.echo("\n".join([*(f"removed {name}" for name in removed), f"{len(removed)} files removed"]))


@click.command()
@store_path
@click.argument("artifact")
def drop(store: Path, artifact: str) -> None:
    """Remove ARTIFACT (a site, an SAE's id, predictions, lens/LENS/SITE) with its labels from STORE, to free space."""
    with progress() as report:
        name = maintenance.drop(store, artifact, report)
    click.echo(f"{name} is gone. To have it again: {having_again(store, name)}")


@click.command()
@store_path
@click.argument("file", type=click.Path(path_type=Path))
def label(store: Path, file: Path) -> None:
    """Name features of STORE from FILE.

    FILE is a .csv, .jsonl or .json with sae, feature, label; or Neuronpedia's exported explanations, .jsonl (also .gz)
    or .json with modelId, layer (or sourceId), index, description: those of SAEs that are not stored are left out.
    """
    with progress() as report:
        n_named = maintenance.label(store, file, report)
    click.echo(f"{n_named} features named")
