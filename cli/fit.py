"""Fitting: fit-lens."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pyarrow as pa

import actstore
from actstore.lens_fitting import fit_lens as fit
from actstore.results import Result

from .output import json_option, print_result, progress, store_argument

__all__ = ["fit_lens"]


@click.command("fit-lens")
@store_argument
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The folder to write.")
@click.option(
    "--site", "sites", multiple=True, metavar="SITE", help="Sites to fit [every stored resid_pre, resid_post]."
)
@click.option("--steps", "n_steps", type=click.IntRange(min=1), default=1000, show_default=True, help="Steps at most.")
@click.option("--batch-rows", type=click.IntRange(min=1), default=1024, show_default=True, help="Rows of a step.")
@click.option(
    "--held-out", type=float, default=0.1, show_default=True, help="Share of documents held out, between 0 and 1."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of order and of what is held out."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@json_option
def fit_lens(store: str, out: Path, sites: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Fit a tuned lens to the residual streams that STORE holds, without the model.

    Needs the last resid_post. Prints KL(model ‖ lens) on held-out rows, in nats, before and after.
    """
    with actstore.open(store) as opened, progress() as report:
        fitted = fit(opened, out, sites=sites or ("resid_*",), report=report, **options)
    print_result(Result(pa.Table.from_pylist([asdict(one) for one in fitted])), "json" if as_json else "table")
    command = shlex.join(["actstore", "lens", store, "--doc", "0", "--tuned", str(out)])
    click.echo(f"written to {out}: {command}", err=True)
