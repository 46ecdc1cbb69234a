"""An extraction from request to sealed pass: this is the story, each step lives next door."""

from __future__ import annotations

import time
from dataclasses import dataclass

from actstore.errors import InvalidInput, explain
from actstore.models import load_model, prove
from actstore.progress import Report, silent
from actstore.saes import Encoder, NeuronEncoder, SaeEncoder, expand_sae_arguments, load_sae, without_neurons
from actstore.store import Journal, PassWriter, StoreReader, StoreWriter, exclusive

from .checks import check_context, check_sites, check_target, check_tokenizer
from .identity import neurons_of, pass_id_of
from .opening import Opening
from .planning import tokenizer_of
from .request import Request
from .runner import ShardRunner
from .work import work_through

__all__ = ["Outcome", "extract"]

LOCK_SECONDS = 3600.0  # another process may be tokenising a large corpus


@dataclass(frozen=True)
class Outcome:
    """What an extraction did: the pass, the shards that this process made, and what is complete.

    `unfinished` are other passes of the store that lack shards, such as those of an appended segment.
    """

    pass_id: str
    n_shards_made: int
    n_rows_made: int
    seconds: float
    complete: bool
    unfinished: tuple[str, ...] = ()


def extract(request: Request, report: Report = silent) -> Outcome:
    """Run a model over a dataset and store what was asked for; resumes where an earlier run ended.

    Raises ActstoreError for everything that a user can cause; every shard that was finished is kept.
    """
    check_target(request)
    files = without_neurons(request.saes)
    coders = [load_sae(one) for one in expand_sae_arguments(files, allow_pt=request.allow_pt)]
    model = load_model(
        request.model,
        revision=request.revision,
        dtype=request.dtype,
        device=request.device,
        device_map=request.device_map,
    )
    check_sites(request, model, coders, report)
    check_context(request, model)
    tokenizer = tokenizer_of(request)
    check_tokenizer(tokenizer, model)
    encoders: list[Encoder] = [SaeEncoder(coder, model.device) for coder in coders]
    encoders += [NeuronEncoder(identity) for identity in neurons_of(request, model)]
    opening = Opening(request, model, tokenizer, encoders, report)
    StoreWriter.prepare(request.out)
    with exclusive(request.out, wait_seconds=LOCK_SECONDS):
        writer = opening.open_or_create()
        recipe = opening.recipe(writer)
        if request.append is not None:
            opening.append(writer)
        runner = ShardRunner(model, opening.encoders, recipe, writer.store.shard_rows, writer.store.batch_tokens)
        _prepare_pass(opening, writer, runner)
    return _run(request, PassWriter(writer, pass_id_of(recipe)), runner, report)


def _prepare_pass(opening: Opening, writer: StoreWriter, runner: ShardRunner) -> None:
    """Prove the model wherever it will run, and begin the pass if it is new.

    Raises InvalidInput where the pass is done but something of it was dropped: the same recipe cannot make it again.
    """
    pass_id, new = pass_id_of(runner.recipe), pass_id_of(runner.recipe) not in writer.layout.passes
    pending = range(writer.layout.n_shards) if new else PassWriter(writer, pass_id).pending()
    if not pending:
        _refuse_dropped(PassWriter(writer, pass_id), writer)
        return
    opening.check_space(writer, runner.recipe, pending)
    opening.report("proving sites and SAEs", 0, None, "")
    checks = prove(runner.model, runner.captured())
    if new:
        opening.begin(writer, runner.recipe, checks)


def _refuse_dropped(passing: PassWriter, writer: StoreWriter) -> None:
    gone = [one for one in passing.made.artifacts if writer.layout.artifacts.get(one) != passing.pass_id]
    if gone:
        raise InvalidInput(
            explain(
                f"{', '.join(gone)} was made by this command and dropped since; the rest is complete",
                next_step=f"to have it again, ask for it alone: actstore extract MODEL --into {writer.root} …",
            )
        )


def _run(request: Request, passing: PassWriter, runner: ShardRunner, report: Report) -> Outcome:
    started = time.monotonic()
    journal = Journal(request.out)
    journal.write("begin", pass_id=passing.pass_id, device=str(runner.model.device))
    made = work_through(passing, StoreReader(request.out), runner, request.mixed, journal, report)
    seconds = time.monotonic() - started
    complete = passing.seal()
    journal.write(
        "end", pass_id=passing.pass_id, n_shards=made.n_shards, n_rows=made.n_rows, seconds=seconds, complete=complete
    )
    others = tuple(one for one in passing.writer.layout.passes if one != passing.pass_id)
    unfinished = tuple(one for one in others if PassWriter(passing.writer, one).pending())
    return Outcome(passing.pass_id, made.n_shards, made.n_rows, seconds, complete, unfinished)
