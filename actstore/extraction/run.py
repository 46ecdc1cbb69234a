"""An extraction from request to sealed pass: this is the story, each step lives next door."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from actstore.blocks import Segment, TokenShard
from actstore.corpus import TokenizerHandle
from actstore.errors import InvalidInput, MissingInput, explain
from actstore.health import HealthCheck
from actstore.models import LoadedModel, load_model, prove
from actstore.progress import Report, silent
from actstore.recipe import CorpusIdentity, Recipe
from actstore.saes import SaeEncoder, SparseCoder, check_width, expand_sae_arguments, load_sae
from actstore.sites import expand_sites, parse_site
from actstore.store import Journal, PassFile, PassWriter, StoreFile, StoreReader, StoreWriter, exclusive

from . import identity
from .corpus import digest_of_dataset, store_segment
from .kit import write_feature_logits, write_unembedding, write_vocabulary
from .plan import check_disk
from .planning import estimate_of, tokenizer_of
from .proof import prove_saes
from .request import DEFAULT_BATCH_TOKENS, DEFAULT_SHARD_ROWS, Request
from .runner import ShardRunner
from .specs import firings_of, matrices_of
from .work import work_through

__all__ = ["Outcome", "extract"]

LOCK_SECONDS = 3600  # another process may be tokenising a large corpus
VERSIONED = ("actstore", "zarr", "numcodecs", "numpy", "torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Outcome:
    """What an extraction did: the pass, the shards that this process made, and whether the pass is complete."""

    pass_id: str
    n_shards_made: int
    n_rows_made: int
    seconds: float
    complete: bool


def extract(request: Request, report: Report = silent) -> Outcome:
    """Run a model over a dataset and store what was asked for; resumes where an earlier run ended.

    Raises ActstoreError for everything that a user can cause; every shard that was finished is kept.
    """
    _check_target(request)
    coders = [load_sae(one) for one in expand_sae_arguments(request.saes)]
    model = load_model(request.model, revision=request.revision, dtype=request.dtype, device=request.device)
    _check_sites(request, model, coders, report)
    tokenizer = tokenizer_of(request)
    encoders = [SaeEncoder(coder, model.device) for coder in coders]
    StoreWriter.prepare(request.out)
    with exclusive(request.out, wait_seconds=LOCK_SECONDS):
        writer = _open_or_create(request, model, tokenizer)
        recipe = _recipe(request, writer, model, tokenizer, encoders, report)
        if request.append is not None:
            _append(request, writer, tokenizer, report)
        pass_id = identity.pass_id_of(recipe)
        if pass_id not in writer.layout.passes:
            _begin(request, writer, model, encoders, recipe, report)
    return _run(request, writer, pass_id, _runner(model, encoders, recipe, writer.store), report)


def _check_target(request: Request) -> None:
    """Raise where the store or the data cannot be what they are asked to be, before anything is loaded or made."""
    exists = (request.out / "store.json").exists()
    if not exists and (request.into or request.append is not None):
        what, next_step = f"There is no store at {request.out} to add to", "leave out --into and --append to make one"
        raise MissingInput(explain(what, next_step=next_step))
    if not exists and request.dataset is None:
        raise MissingInput(
            explain(
                f"{request.out} has no corpus yet and no dataset was given",
                accepted="a file (.jsonl, .txt, .parquet), a folder of them, a hub id, or -",
                next_step="actstore extract MODEL DATASET --out STORE …",
            )
        )
    if request.append == "-" or isinstance(request.append, Iterator):
        raise InvalidInput(
            explain(
                "Documents to append may have to be read twice, and standard input or an iterator can be read once",
                accepted="a file, folder, hub id or list",
                next_step="save them to a .jsonl file first",
            )
        )


def _check_sites(request: Request, model: LoadedModel, coders: Sequence[SparseCoder], report: Report) -> None:
    """Raise where a site that is asked for, or read by an SAE or lens, is not on the model or has another width."""
    expand_sites(request.sites, model.sites())
    identity.lens_sites(request, model)
    for coder in coders:
        identity.known_site(coder.identity.site, model.sites())
        check_width(coder, model.site_width(parse_site(coder.identity.site)))
        report(f"SAE {coder.identity.sae}: {coder.d_sae} features of {coder.identity.site}", 0, None, "")


def _open_or_create(request: Request, model: LoadedModel, tokenizer: TokenizerHandle) -> StoreWriter:
    if StoreWriter.prepare(request.out):
        writer = StoreWriter.open(request.out)
        # Without a corpus it is what a run left that failed while reading the text: nothing stands on it.
        if writer.layout.segments:
            _refuse_other_window(request, writer.store)
            writer.repair_metadata()
            return writer
    window = request.window
    store = StoreFile(
        shard_rows=request.shard_rows or DEFAULT_SHARD_ROWS,
        batch_tokens=request.batch_tokens or DEFAULT_BATCH_TOKENS,
        context=window.context,
        stride=window.text_stride(has_bos=tokenizer.bos_id is not None),
        tokenizer={
            "name": model.facts.name,
            "digest": tokenizer.digest,
            "bos_id": tokenizer.bos_id,
            "special_ids": sorted(tokenizer.special_ids),
        },
        model={"identity": asdict(model.identity), "facts": asdict(model.facts)},
        vocabulary=write_vocabulary(request.out, tokenizer.vocabulary()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: importlib.metadata.version(name) for name in VERSIONED},
    )
    return StoreWriter.create(request.out, store)


def _refuse_other_window(request: Request, store: StoreFile) -> None:
    """Raise InvalidInput where an option that a store fixes for ever is asked to be different."""
    for name in ("context", "stride", "shard_rows", "batch_tokens"):
        asked, fixed = getattr(request, name), getattr(store, name)
        if asked is not None and asked != fixed:
            raise InvalidInput(
                explain(
                    f"The store has {name} {fixed}, and {asked} was asked for",
                    accepted=f"--{name.replace('_', '-')} {fixed}, or leave it out",
                    next_step="choose another --out for other windows",
                )
            )


def _recipe(
    request: Request,
    writer: StoreWriter,
    model: LoadedModel,
    tokenizer: TokenizerHandle,
    encoders: Sequence[SaeEncoder],
    report: Report,
) -> Recipe:
    """Return the request's recipe, the corpus stored; raises RecipeMismatch where the store has another."""
    if not writer.layout.segments:
        store_segment(writer, request, request.dataset, tokenizer, report)
        digest = writer.layout.segments[0].documents_digest
    elif request.dataset is not None:
        digest = digest_of_dataset(request, request.dataset, writer.layout.segments[0].n_docs)
    else:
        digest = writer.layout.segments[0].documents_digest
    recipe = _make(request, writer, model, encoders, identity.corpus_identity(writer.store, tokenizer, digest))
    identity.find_pass(recipe, writer.store, writer.layout, StoreReader(request.out).passes, request)
    return recipe


def _make(
    request: Request,
    writer: StoreWriter,
    model: LoadedModel,
    encoders: Sequence[SaeEncoder],
    corpus: CorpusIdentity,
) -> Recipe:
    saes = [encoder.coder.identity for encoder in encoders]
    return identity.make_recipe(request, model, model.identity, model.dtype, saes, corpus, writer.layout)


def _append(request: Request, writer: StoreWriter, tokenizer: TokenizerHandle, report: Report) -> None:
    """Store a further segment, unless the last one is this very data: then an earlier run died after storing it."""
    last = writer.layout.segments[-1]
    if len(writer.layout.segments) > 1 and _same_documents(request, last):
        return
    store_segment(writer, request, request.append, tokenizer, report)


def _same_documents(request: Request, segment: Segment) -> bool:
    return digest_of_dataset(request, request.append, segment.n_docs) == segment.documents_digest


def _begin(
    request: Request,
    writer: StoreWriter,
    model: LoadedModel,
    encoders: Sequence[SaeEncoder],
    recipe: Recipe,
    report: Report,
) -> None:
    """Prove model and SAEs, check the disk, write the kit, and declare the pass."""
    matrices, firings = matrices_of(recipe, model.site_width), firings_of(recipe)
    identity.refuse_again(PassFile(recipe.to_json(), matrices, firings), writer.layout)
    layout = writer.layout
    plan = estimate_of(request, model, recipe, layout.n_docs, layout.n_rows, layout.n_shards)
    report(f"plan: {plan}", 0, None, "")
    check_disk(plan, force=request.force)
    report("proving sites and SAEs", 0, None, "")
    checks: list[HealthCheck] = list(prove(model, _runner(model, encoders, recipe, writer.store).captured()))
    checks += prove_saes(
        model, encoders, recipe, _shards(request), writer.store.batch_tokens, allow_unhealthy=request.allow_unhealthy
    )
    made = PassFile(
        recipe=recipe.to_json(),
        matrices=matrices,
        firings=firings,
        kit={"unembedding": write_unembedding(request.out, model)},
        files=write_feature_logits(request.out, model, encoders),
        health=tuple(check.to_json() for check in checks),
    )
    writer.begin_pass(identity.pass_id_of(recipe), made)


def _shards(request: Request) -> Iterable[TokenShard]:
    reader = StoreReader(request.out)
    return (TokenShard(shard, reader.tokens(shard)) for shard in range(reader.layout.n_shards))


def _runner(model: LoadedModel, encoders: Sequence[SaeEncoder], recipe: Recipe, store: StoreFile) -> ShardRunner:
    return ShardRunner(model, encoders, recipe, store.shard_rows, store.batch_tokens)


def _run(request: Request, writer: StoreWriter, pass_id: str, runner: ShardRunner, report: Report) -> Outcome:
    started = time.monotonic()
    journal = Journal(request.out)
    journal.write("begin", pass_id=pass_id, device=str(runner.model.device))
    made = work_through(PassWriter(writer, pass_id), StoreReader(request.out), runner, request.mixed, journal, report)
    seconds = time.monotonic() - started
    complete = PassWriter(writer, pass_id).seal()
    journal.write(
        "end", pass_id=pass_id, n_shards=made.n_shards, n_rows=made.n_rows, seconds=seconds, complete=complete
    )
    return Outcome(pass_id, made.n_shards, made.n_rows, seconds, complete)
