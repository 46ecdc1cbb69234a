"""An extraction from request to sealed pass: this is the story, each step lives next door."""

from __future__ import annotations

import shlex
from contextlib import ExitStack

from actstore.models import load_model, prove
from actstore.progress import Report, silent
from actstore.saes import ENCODERS, Encoder, NeuronEncoder, expand_sae_arguments, load_sae, without_neurons
from actstore.store import LOCK_SECONDS, PassWriter, StoreWriter, at_work, exclusive

from .checks import check_context, check_sites, check_target, check_tokenizer, tell_overruled
from .identity import neurons_of, pass_id_of, refuse_dropped
from .memory import keep_freed_memory
from .opening import Opening
from .planning import tokenizer_of
from .request import Request
from .runner import ShardRunner
from .work import Outcome, run_pass

__all__ = ["extract"]


def extract(request: Request, report: Report = silent) -> Outcome:
    """Run a model over a dataset and store what was asked for; resumes where an earlier run ended.

    Raises ActstoreError for everything that a user can cause; every shard that was finished is kept.
    """
    keep_freed_memory()
    check_target(request)
    files = without_neurons(request.saes)
    resolved = expand_sae_arguments(files, allow_pt=request.allow_pt)
    tell_overruled(resolved, report)
    coders = [load_sae(one) for one in resolved]
    model = load_model(
        request.model,
        revision=request.revision,
        dtype=request.dtype,
        device=request.device,
        device_map=request.device_map,
    )
    check_sites(request, model, coders, report)
    check_context(request, model, report)
    tokenizer = tokenizer_of(request)
    check_tokenizer(tokenizer, model)
    encoders: list[Encoder] = [ENCODERS[request.sae_precision](coder, model.device) for coder in coders]
    encoders += [NeuronEncoder(identity) for identity in neurons_of(request, model)]
    opening = Opening(request, model, tokenizer, encoders, report)
    StoreWriter.prepare(request.out)
    with ExitStack() as working:
        with exclusive(request.out, wait_seconds=LOCK_SECONDS):
            writer = opening.open_or_create()
            recipe = opening.recipe(writer)
            if request.append is not None:
                opening.append(writer)
            runner = ShardRunner(model, opening.encoders, recipe, writer.store.shard_rows, writer.store.batch_tokens)
            _prepare_pass(opening, writer, runner)
            working.enter_context(at_work(request.out))
        return run_pass(PassWriter(writer, pass_id_of(recipe)), runner, report, mixed=request.mixed)


def _prepare_pass(opening: Opening, writer: StoreWriter, runner: ShardRunner) -> None:
    """Prove the model wherever it will run, and begin the pass if it is new.

    Raises InvalidInput where the pass is done but something of it was dropped: the same recipe cannot make it again.
    """
    pass_id, new = pass_id_of(runner.recipe), pass_id_of(runner.recipe) not in writer.layout.passes
    pending = range(writer.layout.n_shards) if new else PassWriter(writer, pass_id).pending()
    if not pending:
        again = f"ask for it alone: actstore extract MODEL --into {shlex.quote(str(writer.root))} …"
        refuse_dropped(PassWriter(writer, pass_id), again)
        opening.complete_kit(writer, runner.recipe)
        return
    opening.check_space(writer, runner.recipe, pending)
    opening.report("proving sites and SAEs", 0, None, "")
    checks = prove(runner.model, runner.captured())
    if new:
        opening.begin(writer, runner.recipe, checks)
    else:
        opening.complete_kit(writer, runner.recipe)
