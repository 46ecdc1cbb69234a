"""What is refused before anything is loaded, made or changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from actstore.corpus import TokenizerHandle
from actstore.errors import InvalidInput, MissingInput, explain, unknown_name
from actstore.models import LoadedModel, ModelDescription
from actstore.progress import Report
from actstore.recipe import SaeIdentity, refuse_same_ids
from actstore.saes import ResolvedSae, SparseCoder, check_width
from actstore.sites import expand_sites, parse_site
from actstore.store import StoreFile, StoreWriter

from .identity import lens_sites, neurons_of, refuse_pattern
from .request import Request

__all__ = [
    "check_context",
    "check_sites",
    "check_target",
    "check_tokenizer",
    "check_window",
    "refuse_unknown_sites",
    "tell_overruled",
]


def check_target(request: Request) -> None:
    """Raise where the store or the data cannot be what they are asked to be."""
    if request.out.exists():
        StoreWriter.prepare(request.out)
    exists = (request.out / "store.json").exists()
    if exists:
        StoreWriter.open(request.out)
    elif request.into or request.append is not None:
        what, next_step = f"There is no store at {request.out} to add to", "leave out --into and --append to make one"
        raise MissingInput(explain(what, next_step=next_step))
    elif request.dataset is None:
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


def tell_overruled(saes: Sequence[ResolvedSae], report: Report) -> None:
    """Report every SAE whose configuration says another site than its argument, which wins: the proof decides."""
    for one in saes:
        if one.overruled:
            report(f"SAE {one.sae}: {one.overruled}", 0, None, "")


def check_sites(request: Request, model: LoadedModel, coders: Sequence[SparseCoder], report: Report) -> None:
    """Raise where a site that is asked for, or read by an SAE or lens, is not on the model or has another width."""
    expand_sites(request.sites, model.sites())
    lens_sites(request, model)
    existing = [str(site) for site in model.sites()]
    for coder in coders:
        identity = coder.identity
        refuse_unknown_sites(identity, existing)
        refuse_pattern(identity)
        written = identity.write_site
        check_width(
            coder,
            model.site_width(parse_site(identity.site)),
            model.site_width(parse_site(written)) if written else None,
        )
        what = f"{identity.site}, which write {written}" if written else identity.site
        report(f"SAE {identity.sae}: {coder.d_sae} features of {what}", 0, None, "")
    neurons = neurons_of(request, model)
    refuse_same_ids([*(coder.identity.sae for coder in coders), *(one.sae for one in neurons)])
    for one in neurons:
        report(f"neurons {one.sae}: {_spelled(one)}", 0, None, "")


def _spelled(neurons: SaeIdentity) -> str:
    what = "neurons" if parse_site(neurons.site).kind == "mlp_act" else "dimensions (neurons are those of mlp_act)"
    kept = "all" if neurons.truncated_to is None else f"the {neurons.truncated_to} largest"
    return f"{neurons.width} {what} of {neurons.site}, {kept} of a row's positive activations"


def refuse_unknown_sites(identity: SaeIdentity, existing: Sequence[str]) -> None:
    """Raise UnknownName where a model does not have a site that an SAE reads or writes."""
    for site in (identity.site, identity.write_site):
        if site and site not in existing:
            raise unknown_name("site", site, existing, next_step="is this SAE for another model?")


def check_context(request: Request, model: LoadedModel | ModelDescription, report: Report) -> None:
    """Raise InvalidInput where a new store's windows are longer than the model has positions.

    Report where they are longer than those it was trained on.
    """
    limit, trained, context = model.facts.max_positions, model.facts.trained_positions, request.window.context
    if (request.out / "store.json").exists():
        return
    if trained is not None and context > trained:
        what = f"windows of up to {context} tokens, and {model.facts.name} is made for {trained} positions"
        report(f"warning: {what}: what it does beyond them may mean little (--context {trained})", 0, None, "")
    if limit is not None and context > limit:
        raise InvalidInput(
            explain(
                f"Windows of {context} tokens are longer than the {limit} positions of {model.facts.name}",
                accepted=f"--context {limit} or less",
            )
        )


def check_tokenizer(tokenizer: TokenizerHandle, model: LoadedModel | ModelDescription) -> None:
    """Raise InvalidInput where the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocabulary_size > model.facts.vocabulary_size:
        raise InvalidInput(
            explain(
                f"The tokenizer has {tokenizer.vocabulary_size} ids, the model embeds {model.facts.vocabulary_size}",
                accepted="the tokenizer that the model was trained with",
                next_step="leave out --tokenizer, or give the right one",
            )
        )


def check_window(request: Request, store: StoreFile) -> None:
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
