"""Asking: sql, query, queries, and the three headline questions lens, top, stats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pyarrow.compute as pc

import actstore
from actstore.errors import InvalidInput, QueryError, explain
from actstore.info import describe
from actstore.named import load_queries
from actstore.pictures import lens_grid
from actstore.results import Result

from .output import FORMATS, draw_result, json_option, plot_option, print_json, print_result, store_argument

__all__ = ["info", "lens", "queries", "query", "sql", "stats", "top"]

format_option = click.option(
    "--format", "form", type=click.Choice(FORMATS), help="How rows are printed [as --output ends, else table]."
)
output_option = click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write to a file.")


SUFFIXES = {".txt": "table", **{f".{form}": form for form in FORMATS if form != "table"}}


def _form(as_json: bool, form: str | None = None, output: Path | None = None) -> str:
    """Return the format that is asked for: said, or by the ending of the file.

    Raises InvalidInput for an ending that says none.
    """
    if as_json or form or output is None:
        return "json" if as_json else form or "table"
    if output.suffix not in SUFFIXES:
        what = f"The ending of {output} does not say a format"
        raise InvalidInput(explain(what, accepted=", ".join(SUFFIXES), next_step="or add --format"))
    return SUFFIXES[output.suffix]


@click.command()
@store_argument
@click.argument("statement")
@format_option
@output_option
@click.option("--limit", type=click.IntRange(min=1), default=1000, show_default=True, help="Rows at most.")
@json_option
def sql(store: str, statement: str, form: str | None, output: Path | None, limit: int, as_json: bool) -> None:
    """Ask STORE one SQL question; `SHOW TABLES` lists what there is to ask."""
    form = _form(as_json, form, output)
    with actstore.open(store) as opened:
        print_result(opened.sql(statement, limit=limit), form, output)


@click.command()
@store_argument
@click.argument("name")
@click.option("-p", "--parameter", "given", multiple=True, metavar="KEY=VALUE", help="A parameter of the query.")
@format_option
@output_option
@click.option("--limit", type=click.IntRange(min=1), help="Rows at most [10000; of a picture 1000000].")
@plot_option
@click.option("--first", type=int, help="First position of the picture.")
@click.option("--last", type=int, help="Last position of the picture.")
@json_option
def query(
    store: str,
    name: str,
    given: tuple[str, ...],
    form: str | None,
    output: Path | None,
    limit: int | None,
    plot: Path | None,
    first: int | None,
    last: int | None,
    as_json: bool,
) -> None:
    """Ask STORE a named query; `actstore queries` lists them with their parameters."""
    form = _form(as_json, form, output)
    with actstore.open(store) as opened:
        result = opened.query(name, _parameters(given), limit=limit or (1_000_000 if plot else 10_000))
    if plot:
        draw_result(result, plot, first=first, last=last)
    else:
        print_result(result, form, output)


def _parameters(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for text, (name, equals, _) in zip(given, pairs, strict=True):
        if not name or not equals:
            raise QueryError(explain(f"The parameter {text!r} cannot be read", accepted="-p key=value"))
    return {name: value for name, _, value in pairs}


@click.command()
@click.argument("name", required=False)
@json_option
def queries(name: str | None, as_json: bool) -> None:
    """List the named queries, or show one with its parameters and SQL."""
    from actstore.named import named_query

    shown = [named_query(name)] if name else list(load_queries().values())
    if as_json:
        print_json([{**vars(one), "parameters": [vars(each) for each in one.parameters]} for one in shown])
        return
    for one in shown:
        click.echo(f"{one.name}: {one.summary}")
        for each in one.parameters:
            default = "needed" if each.required else f"default {each.default}"
            click.echo(f"    {each.name:<14} {each.kind:<9} {default:<15} {each.help}")
        if name:
            click.echo(f"\n{one.text}\n\n{one.sql}")


@click.command()
@store_argument
@click.option("--doc", type=int, required=True, help="The document.")
@click.option("-k", type=int, default=1, show_default=True, help="Tokens per site and position.")
@click.option("--sites", default="resid_post.*", show_default=True, help="Which sites, as a pattern.")
@click.option("--first", type=int, default=0, show_default=True, help="First position shown.")
@click.option("--last", type=int, help="Last position shown.")
@click.option("--tuned", type=click.Path(path_type=Path), help="The folder of a tuned lens [the logit lens].")
@click.option("--allow-pt", is_flag=True, help="Read a tuned lens from params.pt too (torch.load, weights only).")
@plot_option
@json_option
def lens(
    store: str,
    doc: int,
    k: int,
    sites: str,
    first: int,
    last: int | None,
    tuned: Path | None,
    allow_pt: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """What each layer would predict at each token of a document of STORE: the logit lens, or a tuned one."""
    with actstore.open(store) as opened:
        kind = "tuned" if tuned else "logit"
        result = opened.lens(kind, doc=doc, k=k, sites=sites, folder=tuned, allow_pt=allow_pt)
    _must_show(result, doc, first, last)
    if plot:
        draw_result(result, plot, first=first, last=last)
    elif as_json or k > 1:
        print_result(_between(result, first, last), _form(as_json))
    else:
        click.echo(lens_grid(result, first=first, last=last))


def _must_show(result: Result, doc: int, first: int, last: int | None) -> None:
    """Raise QueryError where a lens has lines and none is at the positions that are asked for."""
    if len(result) and not len(_between(result, first, last)):
        end = pc.max(result.table["pos"]).as_py()
        asked = f"from {first}" if last is None else f"from {first} to {last}"
        what = f"Document {doc} has no position {asked}"
        raise QueryError(explain(what, accepted=f"--first and --last within 0 to {end}"))


def _between(result: Result, first: int, last: int | None) -> Result:
    """Return the lines of a lens whose positions are shown."""
    position = result.table["pos"]
    shown = pc.greater_equal(position, first)
    if last is not None:
        shown = pc.and_(shown, pc.less_equal(position, last))
    return Result(result.table.filter(shown), result.truncated)


@click.command()
@store_argument
@click.argument("sae")
@click.argument("feature", type=int)
@click.option("-k", type=int, default=20, show_default=True, help="How many.")
@click.option("--per-document", type=int, default=0, show_default=True, help="At most so many of a document; 0: all.")
@plot_option
@json_option
def top(store: str, sae: str, feature: int, plot: Path | None, as_json: bool, **options: Any) -> None:
    """The strongest firings of an SAE's FEATURE in STORE, each in its context."""
    with actstore.open(store) as opened:
        result = opened.query("max_activating", {"sae": sae, "feature": feature, **options})
    if plot:
        draw_result(result, plot)
    else:
        print_result(result, _form(as_json))


@click.command()
@store_argument
@click.argument("sae")
@click.option("--feature", type=int, help="One feature only.")
@click.option("-k", type=int, default=20, show_default=True, help="How many.")
@plot_option
@json_option
def stats(store: str, sae: str, feature: int | None, k: int, plot: Path | None, as_json: bool) -> None:
    """How often and how strongly features of an SAE fire, and how many never do; drawn, one is a histogram."""
    with actstore.open(store) as opened:
        if plot and feature is not None:
            result = opened.query("activation_histogram", {"sae": sae, "feature": feature})
        else:
            result = opened.query("feature_stats", {"sae": sae, "feature": feature, "k": k})
    if plot:
        draw_result(result, plot)
    else:
        print_result(result, _form(as_json))


@click.command()
@store_argument
@json_option
def info(store: str, as_json: bool) -> None:
    """What is in STORE: corpus, passes, sites, SAEs, sizes, and every proof that is not ok."""
    with actstore.open(store) as opened:
        described = describe(opened)
    if as_json:
        print_json(described.to_json())
    else:
        click.echo(str(described))
