"""`actstore export`: what a store holds, for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import actstore
from actstore.exports import BY, DTYPES, FORMATS, REDUCTIONS

from .output import bytes_text, json_option, print_json, progress, store_argument

__all__ = ["export"]

EXAMPLES = """\b
Examples:
  actstore export gemma.act tokens features 20-gemmascope-res-16k --format parquet --out replica
  actstore export gemma.act 20-gemmascope-res-16k --format anndata --out tokens.h5ad
  actstore export gemma.act 20-gemmascope-res-16k --format anndata --by document --reduce max --out documents.zarr
  actstore export gemma.act resid_post.5 resid_post.20 --format safetensors --plain --out residuals.safetensors"""


@click.command(epilog=EXAMPLES)
@store_argument
@click.argument("what", nargs=-1, required=True)
@click.option("--format", "form", type=click.Choice(list(FORMATS)), required=True, help="For which tool.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file or directory to make.")
@click.option("--by", type=click.Choice(BY), help="anndata: what a row is [token].")
@click.option("--reduce", type=click.Choice(REDUCTIONS), help="anndata by document: how its tokens become one row.")
@click.option("--plain", is_flag=True, default=None, help="safetensors, npy: leave out special and repeated tokens.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="safetensors, npy: written dtype [as stored].")
@json_option
def export(store: str, what: tuple[str, ...], form: str, out: Path, as_json: bool, **options: Any) -> None:
    """Write WHAT of STORE for other tools.

    WHAT is a list of tables, SAE ids (their firings) or all for parquet; one SAE id for anndata and neuronpedia; sites
    for safetensors; one site for npy.
    """
    given = {name: value for name, value in options.items() if value is not None}
    with actstore.open(store) as opened, progress() as report:
        written = opened.export(what, format=form, out=out, report=report, **given)
    if as_json:
        print_json(vars(written))
        return
    size = bytes_text(written.n_bytes)
    click.echo(f"{written.path}: {written.n_rows} rows in {written.n_files} files, {size}")
