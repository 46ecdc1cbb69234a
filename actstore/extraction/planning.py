"""The plan of an extraction that has not begun: configuration and text are read, no weights are."""

from __future__ import annotations

from actstore.corpus import TokenizerHandle, Window, load_tokenizer
from actstore.errors import InvalidInput, MissingInput, explain
from actstore.models import LoadedModel, ModelDescription, describe_model
from actstore.progress import Report, silent
from actstore.recipe import CorpusIdentity, ModelIdentity, Recipe, SaeIdentity
from actstore.saes import NEURONS, ResolvedSae, expand_sae_arguments, sae_sizes, without_neurons
from actstore.store import Layout, StoreReader

from .checks import check_context, check_tokenizer, refuse_unknown_sites, tell_overruled
from .corpus import count_rows
from .identity import make_recipe, neurons_of
from .kit import kit_bytes
from .plan import Plan, estimate
from .request import DEFAULT_BATCH_TOKENS, DEFAULT_SHARD_ROWS, Request
from .specs import firings_of, matrices_of

__all__ = ["estimate_of", "firings_a_row", "plan_extraction", "planned_identity", "tokenizer_of"]

UNKNOWN = ""  # a digest that only the weights or the whole text could tell; the plan needs none


def plan_extraction(request: Request, report: Report = silent) -> Plan:
    """Return what an extraction will cost; reads configuration and text, loads no weights."""
    model = describe_model(request.model, revision=request.revision)
    tokenizer = tokenizer_of(request)
    check_tokenizer(tokenizer, model)
    check_context(request, model, report)
    if request.into or (request.dataset is None and request.append is None):
        return _plan_over_stored(request, model, tokenizer, report)
    window, shard_rows = request.window, request.shard_rows or DEFAULT_SHARD_ROWS
    if request.append is not None:
        store = StoreReader(request.out).store
        window, shard_rows = Window(store.context, store.stride), store.shard_rows
    recipe = _draft(request, model, tokenizer, window, shard_rows, Layout(), report)
    n_documents, n_rows, n_shards = count_rows(request, tokenizer, window, shard_rows, report)
    return estimate_of(request, model, recipe, n_documents, n_rows, n_shards, with_corpus=True)


def _plan_over_stored(request: Request, model: ModelDescription, tokenizer: TokenizerHandle, report: Report) -> Plan:
    """Return the plan of a further pass over a corpus that is stored."""
    if not (request.out / "store.json").exists():
        raise MissingInput(
            explain("No dataset was given to plan for", next_step="actstore extract MODEL DATASET --out STORE --plan")
        )
    reader = StoreReader(request.out)
    store, layout = reader.store, reader.layout
    recipe = _draft(request, model, tokenizer, Window(store.context, store.stride), store.shard_rows, layout, report)
    return estimate_of(request, model, recipe, layout.n_docs, layout.n_rows, layout.n_shards)


def _draft(
    request: Request,
    model: ModelDescription,
    tokenizer: TokenizerHandle,
    window: Window,
    shard_rows: int,
    layout: Layout,
    report: Report,
) -> Recipe:
    facts = model.facts
    corpus = CorpusIdentity(
        documents_digest=UNKNOWN,
        max_tokens=request.max_tokens,
        tokenizer_digest=tokenizer.digest,
        context=window.context,
        stride=window.text_stride(has_bos=tokenizer.bos_id is not None),
        shard_rows=shard_rows,
        batch_tokens=request.batch_tokens or DEFAULT_BATCH_TOKENS,
    )
    identity = ModelIdentity(
        name=facts.name,
        revision=request.revision,
        architecture=facts.architecture,
        config_digest=UNKNOWN,
        weights_digest=UNKNOWN,
    )
    files = without_neurons(request.saes)
    resolved = expand_sae_arguments(files, allow_pt=request.allow_pt)
    tell_overruled(resolved, report)
    saes = [planned_identity(one) for one in resolved]
    existing = [str(site) for site in model.sites()]
    for coder in saes:
        refuse_unknown_sites(coder, existing)
    saes += neurons_of(request, model)
    return make_recipe(request, model, identity, request.dtype or facts.checkpoint_dtype, saes, corpus, layout)


def planned_identity(one: ResolvedSae) -> SaeIdentity:
    """Return what is known of an SAE before its weights are read."""
    sizes = sae_sizes(one)
    return SaeIdentity(
        sae=one.sae,
        site=str(one.site),
        write_site=str(one.write_site) if one.write_site else None,
        width=sizes.width,
        d_in=sizes.d_in or 0,
        architecture=one.declaration.architecture,
        weights_digest=UNKNOWN,
        declared_l0=one.name.l0 if one.name else one.declaration.declared_l0,
    )


def estimate_of(
    request: Request,
    model: LoadedModel | ModelDescription,
    recipe: Recipe,
    n_documents: int,
    n_rows: int,
    n_shards: int,
    *,
    with_corpus: bool = False,
) -> Plan:
    """Return the plan of a recipe over so many rows; `with_corpus` counts what storing the text takes."""
    facts = model.facts
    return estimate(
        n_documents=n_documents,
        n_rows=n_rows,
        n_shards=n_shards,
        matrices=matrices_of(recipe, model.site_width, model.sites()),
        firings=firings_of(recipe),
        l0={coder.sae: firings_a_row(coder) for coder in recipe.saes},
        kit_bytes=kit_bytes(facts, recipe, model.site_width, sae_weights=request.sae_weights),
        with_corpus=with_corpus,
        out=request.out,
    )


def firings_a_row(coder: SaeIdentity) -> float | None:
    """Return how many firings of a row to expect: of neurons all that are kept, of others what is declared."""
    return coder.truncated_to or coder.width if coder.architecture == NEURONS else coder.declared_l0


def tokenizer_of(request: Request) -> TokenizerHandle:
    """Return the tokenizer of a request: the one given, else the model's own.

    Raises InvalidInput where chats are asked for and it has no chat template.
    """
    tokenizer = _tokenizer_of(request)
    if request.chat_field is not None:
        tokenizer.chats(request.chat_field)
    return tokenizer


def _tokenizer_of(request: Request) -> TokenizerHandle:
    source = request.tokenizer if request.tokenizer is not None else request.model
    if isinstance(source, TokenizerHandle):
        return source
    if hasattr(source, "backend_tokenizer"):
        return TokenizerHandle.from_transformers(source)
    if not isinstance(source, str) and not hasattr(source, "__fspath__"):
        raise InvalidInput(
            explain(
                "A loaded model comes without its tokenizer",
                accepted="tokenizer=…: a loaded tokenizer, or its hub id or folder",
                next_step="actstore.extract(model, dataset, tokenizer=tokenizer, out=…)",
            )
        )
    # The revision is the model's: another repository has its own.
    return load_tokenizer(source, revision=request.revision if request.tokenizer is None else None)
