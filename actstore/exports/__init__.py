"""Exports: what a store holds, written for other tools, shard by shard and never by half."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from actstore.errors import InvalidInput, UnsupportedFormat, explain, unknown_name
from actstore.progress import Report, silent

from .annotated import BY, export_anndata
from .dense import DTYPES, export_npy, export_safetensors
from .neuronpedia import export_neuronpedia
from .parquet import export_parquet
from .reduction import REDUCTIONS
from .source import Source
from .target import Exported

__all__ = ["BY", "DTYPES", "FORMATS", "REDUCTIONS", "Exported", "Source", "export"]

FORMATS: dict[str, Callable[..., Exported]] = {
    "parquet": export_parquet,
    "anndata": export_anndata,
    "neuronpedia": export_neuronpedia,
    "safetensors": export_safetensors,
    "npy": export_npy,
}
OF_SITES = ("safetensors", "npy")


def export(
    source: Source, what: Sequence[str], *, form: str, out: str | Path, report: Report = silent, **options: Any
) -> Exported:
    """Write `what` of a store to `out` in a format; `options` are those of the format's own function.

    Raises UnknownName for an unknown format or thing, UnsupportedFormat for a site in a format that holds none,
    InvalidInput where `out` is there already, nothing is asked for, or an option belongs to another format. Nothing is
    left behind then.
    """
    if form not in FORMATS:
        raise unknown_name("export format", form, FORMATS)
    if not what or isinstance(what, str):
        accepted = "a list of tables or SAEs (parquet), one SAE (anndata, neuronpedia), sites (safetensors, npy: one)"
        raise InvalidInput(explain(f"{what!r} says not what to export", accepted=accepted))
    _refuse_sites(source, what, form)
    own = set(signature(FORMATS[form]).parameters) - {"source", "what", "out", "report"}
    for name in options.keys() - own:
        accepted = ", ".join(sorted(own)) or "none"
        raise InvalidInput(explain(f"The format {form} has no option {name!r}", accepted=accepted))
    return FORMATS[form](source, list(dict.fromkeys(what)), Path(out), report=report, **options)


def _refuse_sites(source: Source, what: Sequence[str], form: str) -> None:
    """Raise UnsupportedFormat where a stored site is asked for in a format that holds none."""
    if form in OF_SITES or not (sites := [name for name in what if name in source.sites]):
        return
    raise UnsupportedFormat(
        explain(
            f"{sites[0]} is a site, and {form} holds none",
            accepted=f"sites in --format {' or '.join(OF_SITES)}",
            next_step=f"actstore export {shlex.quote(source.url)} {sites[0]} --format {OF_SITES[0]} --out FILE",
        )
    )
