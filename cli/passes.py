"""Passes without the model, encode and save-lens; and how every pass is told: its plan and how it went."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from actstore.advice import already_done, completing, how_far_it_came, not_ok, what_stays
from actstore.errors import ActstoreError

from .output import bytes_text, json_option, print_json, progress

if TYPE_CHECKING:
    from actstore.extraction import Outcome, Plan

__all__ = ["encode", "print_outcome", "print_plan", "save_lens", "saying_what_stays"]

INTERRUPTED = 130  # the exit status of what Ctrl-C ends
MOST_SHOWN = 8  # checks that are not ok

EXAMPLES = """\b
Examples:
  actstore encode gemma.act google/gemma-scope-2b-pt-res/layer_20/width_65k/canonical
  actstore encode gemma.act neurons:mlp_act.20"""

store_path = click.argument("store", type=click.Path(path_type=Path))
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
mixed_option = click.option(
    "--mixed", is_flag=True, help="Allow resuming on another type of device; receipts say which."
)
index_option = click.option("--no-index", is_flag=True, help="Do not index when done.")


@click.command(epilog=EXAMPLES)
@store_path
@click.argument("saes", nargs=-1, required=True, metavar="SAE…")
@click.option(
    "--neurons-top", type=int, default=64, show_default=True, help="Largest activations a row kept of neurons:…"
)
@click.option(
    "--sae-weights/--no-sae-weights", default=True, help="Keep the SAEs' weights, for directions and attribution [yes]."
)
@click.option("--activation-bits", type=int, default=10, show_default=True, help="Mantissa bits kept of activations.")
@click.option(
    "--sae-precision",
    type=click.Choice(["float32", "screen"]),
    default="float32",
    show_default=True,
    help="How SAEs multiply: screen is exact at thresholds, and meant for GPUs.",
)
@click.option("--encode-special", is_flag=True, help="List firings of BOS and other special tokens too.")
@device_option
@mixed_option
@click.option("--allow-unhealthy", is_flag=True, help="Store an SAE that fails its proof; recorded.")
@click.option("--allow-pt", is_flag=True, help="Read SAEs from .pt files too (torch.load, weights only).")
@click.option("--force", is_flag=True, help="Go on though the disk may not suffice.")
@index_option
@click.option("--plan", "only_plan", is_flag=True, help="Only say what it would take; loads no weights.")
@json_option
def encode(store: Path, only_plan: bool, as_json: bool, no_index: bool, **options: Any) -> None:
    """Encode sites that STORE has with new SAEs, without the model; the same command resumes.

    SAE is [ID=]SOURCE[@SITE], as for extract; its sites must be stored.
    """
    if only_plan:
        from actstore.extraction import EncodeRequest, plan_encoding

        print_plan(plan_encoding(EncodeRequest(store=store, **options)), as_json, store)
        return
    from actstore.maintenance import encode_and_index

    with saying_what_stays(store), progress() as report:
        outcome = encode_and_index(store, report=report, with_index=not no_index, **options)
    print_outcome(outcome, store, as_json)


@click.command("save-lens")
@store_path
@click.option("--tuned", type=click.Path(path_type=Path), help="The folder of a tuned lens [the logit lens].")
@click.option("--name", help="What the tuned lens is called in the store [its folder's name].")
@click.option(
    "--site", "sites", multiple=True, metavar="SITE", help="Which sites [every stored residual one that lacks it]."
)
@click.option("-k", type=int, default=5, show_default=True, help="Likeliest tokens kept of each site and row.")
@device_option
@mixed_option
@click.option("--allow-pt", is_flag=True, help="Read a tuned lens from params.pt too (torch.load, weights only).")
@click.option("--force", is_flag=True, help="Go on though the disk may not suffice.")
@index_option
@json_option
def save_lens(store: Path, as_json: bool, no_index: bool, **options: Any) -> None:
    """Store what a lens says at the residual streams that STORE has, without the model; the same command resumes.

    Fills lens_tokens and lens_summary. Needs the last resid_post.
    """
    from actstore.maintenance import save_lens_and_index

    with saying_what_stays(store), progress() as report:
        outcome = save_lens_and_index(store, report=report, with_index=not no_index, **options)
    print_outcome(outcome, store, as_json)


@contextmanager
def saying_what_stays(store: Path) -> Iterator[None]:
    """Say what stays where a run is interrupted, or where one that fails leaves a store that was not there."""
    was_there, began = store.exists(), time.time()
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted. {what_stays(store)}", err=True)
        if went := how_far_it_came(store, began):
            click.echo(went, err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    except ActstoreError as error:
        if store.exists() and not was_there:
            error.add_note(what_stays(store))
        raise


def print_outcome(outcome: Outcome, store: Path, as_json: bool, model: str | None = None) -> None:
    """Print how a pass went, what is next, and last what is not ok; model: as it was given, where one was."""
    if as_json:
        report = None if outcome.report is None else outcome.report.to_json()
        print_json({**vars(outcome), "report": report})
        return
    state = "complete" if outcome.complete else "not complete: other processes are at work, or segments are missing"
    click.echo(
        f"Pass {outcome.pass_id} is {state}. Made {outcome.n_shards_made} shards, {outcome.n_rows_made} tokens "
        f"in {outcome.seconds:.1f} s."
    )
    if outcome.report is not None:
        click.echo(str(outcome.report))
    if outcome.unfinished:
        click.echo(f"Other passes lack shards: {', '.join(outcome.unfinished)}. These commands complete them:")
        for command in completing(store, outcome.unfinished, model):
            click.echo(f"  {command}")
    click.echo(f"Next: actstore info {shlex.quote(str(store))}")
    _print_not_ok(not_ok(store, outcome.pass_id))


def _print_not_ok(failed: list[str]) -> None:
    if failed:
        click.secho(f"Warning: {len(failed)} checks of this pass are not ok, and recorded as such:", fg="red")
        for one in failed[:MOST_SHOWN]:
            click.echo(f"  {one}")
        if len(failed) > MOST_SHOWN:
            click.echo(f"  and {len(failed) - MOST_SHOWN} more, which actstore info lists")


def print_plan(plan: Plan, as_json: bool, store: Path | None) -> None:
    """Print what a pass would take; store: whose half-made passes it may be, None where it is none of them."""
    if as_json:
        sizes = {size.artifact: size.n_bytes for size in plan.artifacts}
        print_json({**vars(plan), "artifacts": sizes, "total_bytes": plan.total_bytes})
        return
    click.echo(f"{plan.n_documents} documents, {plan.n_rows} tokens, {plan.n_shards} shards")
    if store and (done := already_done(store)):
        click.echo(done)
    if plan.edges_per_token:
        click.echo(f"{plan.edges_per_token} edges of attention a token: layers x heads x keys kept")
    for name, n_bytes in [
        *((size.artifact, size.n_bytes) for size in plan.artifacts),
        ("index", plan.index_bytes),
        ("kit", plan.kit_bytes),
        ("together", plan.total_bytes),
        ("free on the disk", plan.free_bytes),
    ]:
        click.echo(f"  {name:<40} {bytes_text(n_bytes):>10}")
