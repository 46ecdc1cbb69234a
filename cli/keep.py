"""Keeping a store: index, verify, gc, drop, label."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from actstore import maintenance
from actstore.advice import having_again

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
@json_option
def verify(store: Path, as_json: bool) -> None:
    """Prove every byte of STORE; names all faults at once. Exit status 1 where there are any."""
    with progress() as report:
        found = maintenance.verify(store, report)
    if as_json:
        print_json({"ok": found.ok, **vars(found)})
    else:
        for fault in found.faults:
            click.secho(f"fault: {fault}", fg="red")
        for orphan in found.orphans:
            click.echo(f"orphan: {orphan} (actstore gc removes it)")
        verdict = "all as it was written" if found.ok else f"{len(found.faults)} faults"
        click.echo(f"{found.n_files} files, {bytes_text(found.n_bytes)}: {verdict}")
    sys.exit(0 if found.ok else 1)


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
    """Remove ARTIFACT (a site, an SAE's id, predictions, lens/LENS/SITE) from STORE and free its space."""
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
