"""The recipe of a request, and whether a store was made by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from actstore.corpus import TokenizerHandle
from actstore.errors import InvalidInput, RecipeMismatch, explain
from actstore.models import LoadedModel, ModelDescription
from actstore.recipe import CorpusIdentity, ModelIdentity, Recipe, SaeIdentity
from actstore.saes import NEURONS, expand_neurons
from actstore.sites import Site, expand_sites, parse_site
from actstore.store import Layout, PassFile, PassWriter, StoreFile

from .request import Request
from .tiles import largest_tile

__all__ = [
    "corpus_identity",
    "find_pass",
    "lens_sites",
    "make_recipe",
    "neurons_of",
    "pass_id_of",
    "precision_of",
    "refuse_again",
    "refuse_dropped",
    "refuse_pattern",
]

PASS_DIGITS = 16
MOST_TOLD = 4  # fields in which recipes differ


def pass_id_of(recipe: Recipe) -> str:
    """Return the name of a recipe's pass: the beginning of its digest."""
    return recipe.digest[:PASS_DIGITS]


def corpus_identity(
    store: StoreFile, tokenizer: TokenizerHandle, documents_digest: str, max_tokens: int | None
) -> CorpusIdentity:
    """Return which text a pass stands on, and how it became rows."""
    return CorpusIdentity(
        documents_digest=documents_digest,
        max_tokens=max_tokens,
        tokenizer_digest=tokenizer.digest,
        context=store.context,
        stride=store.stride,
        shard_rows=store.shard_rows,
        batch_tokens=store.batch_tokens,
    )


def lens_sites(request: Request, model: LoadedModel | ModelDescription) -> tuple[Site, ...]:
    """Return the sites that the lens reads: those asked for, else every `resid_post`.

    Raises InvalidInput for a site that is not the residual stream itself.
    """
    if not request.lens_k:
        return ()
    chosen = expand_sites(request.lens_sites or ("resid_post.*",), model.sites())
    for site in chosen:
        if not site.kind.startswith("resid_"):
            raise InvalidInput(
                explain(
                    f"A lens cannot read {site}",
                    accepted="resid_pre, resid_mid and resid_post",
                    next_step="for example --lens-site 'resid_post.*'",
                )
            )
    return chosen


def neurons_of(request: Request, model: LoadedModel | ModelDescription) -> list[SaeIdentity]:
    """Return the identity coders that the request asks for; raises as `expand_neurons`."""
    return expand_neurons(request.saes, model.sites(), model.site_width, request.neurons_top)


def make_recipe(
    request: Request,
    model: LoadedModel | ModelDescription,
    identity: ModelIdentity,
    compute_dtype: str,
    saes: Iterable[SaeIdentity],
    corpus: CorpusIdentity,
    layout: Layout,
) -> Recipe:
    """Return the recipe of a request; raises InvalidInput where nothing was asked for."""
    coders = tuple(saes)
    for coder in coders:
        refuse_pattern(coder)
    if request.attention_top:
        _check_attention(request.attention_top, model, corpus.context)
    if request.lens_k > model.facts.vocabulary_size:
        raise InvalidInput(
            explain(f"--lens {request.lens_k} is too many", accepted=f"at most {model.facts.vocabulary_size} tokens")
        )
    recipe = Recipe(
        model=identity,
        corpus=corpus,
        sites=tuple(map(str, expand_sites(request.sites, model.sites()))),
        saes=coders,
        predictions=True if request.predictions is None else request.predictions,
        lens_k=request.lens_k,
        lens_sites=tuple(map(str, lens_sites(request, model))),
        compute_dtype=compute_dtype,
        storage_dtype=request.storage_dtype or compute_dtype,
        activation_bits=request.activation_bits,
        sae_precision=precision_of(coders, request.sae_precision),
        encode_special=request.encode_special,
        tile_rows=largest_tile(corpus.shard_rows),
        attention_top=request.attention_top,
        attention_min=request.attention_min if request.attention_top else Recipe.attention_min,
    )
    return _without_repeating(recipe, layout) if request.into and request.predictions is None else recipe


def precision_of(coders: Iterable[SaeIdentity], asked: str) -> str:
    """Return the precision that a recipe names: the one asked for, where a coder has weights to multiply with."""
    return asked if any(coder.architecture != NEURONS for coder in coders) else Recipe.sae_precision


def refuse_pattern(coder: SaeIdentity) -> None:
    """Raise InvalidInput for an SAE of attention patterns: their columns depend on the store's windows."""
    for site in (coder.site, coder.write_site):
        if site and parse_site(site).kind == "pattern":
            raise InvalidInput(
                explain(
                    f"The SAE {coder.sae} cannot be about {site}: a pattern has as many columns as a window has keys",
                    accepted="a site of fixed width, such as z",
                )
            )


def _check_attention(k: int, model: LoadedModel | ModelDescription, context: int) -> None:
    expand_sites(("pattern.*",), model.sites())
    if k > context:
        raise InvalidInput(explain(f"--attention-top {k} is too many", accepted=f"at most {context}: a window's keys"))


def _without_repeating(recipe: Recipe, layout: Layout) -> Recipe:
    """Return a further pass's recipe: as it was begun, else with predictions only where the store has none."""
    without = replace(recipe, predictions=False)
    begun = [one for one in (recipe, without) if pass_id_of(one) in layout.passes]
    return begun[0] if begun else without if "predictions" in layout.artifacts else recipe


def find_pass(recipe: Recipe, store: StoreFile, layout: Layout, passes: dict[str, PassFile], request: Request) -> bool:
    """Return whether the store has this recipe's pass, to be resumed; False where a new pass may begin.

    Raises RecipeMismatch where the store was made by another recipe and this is no `--into`, or the further pass has
    another model or corpus; InvalidInput where it would make again what is there.
    """
    if pass_id_of(recipe) in layout.passes:
        return True
    if not passes:
        _refuse_other_store(recipe, store, layout)
        return False
    first = Recipe.from_json(next(iter(passes.values())).recipe)
    if not request.into:
        raise _mismatch(first, recipe, "give the same options to resume, --into to add a pass, or another --out")
    shared = {key for key in first.differences(recipe) if key.startswith(("model.", "corpus."))}
    if shared:
        raise _mismatch(first, recipe, "a further pass needs the store's own model and corpus", only=shared)
    return False


def _refuse_other_store(recipe: Recipe, store: StoreFile, layout: Layout) -> None:
    """Raise RecipeMismatch where a store without a pass (a run ended early, all was dropped) is another's."""
    documents_digest = layout.segments[0].documents_digest
    corpus = replace(recipe.corpus, tokenizer_digest=store.tokenizer["digest"], documents_digest=documents_digest)
    stored = replace(recipe, model=ModelIdentity(**store.model["identity"]), corpus=corpus)
    if stored != recipe:
        raise _mismatch(stored, recipe, "a store has one model and one corpus: give those, or another --out")


def _mismatch(stored: Recipe, asked: Recipe, next_step: str, *, only: set[str] | None = None) -> RecipeMismatch:
    """Return the error that lists the fields in which two recipes differ."""
    differing = {key: pair for key, pair in stored.differences(asked).items() if only is None or key in only}
    told = [f"{key}: {_told(old, new)}" for key, (old, new) in differing.items()]
    more = f"; and {len(told) - MOST_TOLD} more" if len(told) > MOST_TOLD else ""
    shown = "; ".join(told[:MOST_TOLD]) + more
    what = f"The store was made by another recipe, stored → asked: {shown}"
    return RecipeMismatch(explain(what, next_step=next_step))


def _told(stored: Any, asked: Any) -> str:
    """Return how a field differs; of lists and of SAEs only what is not in both."""
    if isinstance(stored, list) and isinstance(asked, list):
        left, right = [one for one in stored if one not in asked], [one for one in asked if one not in stored]
        return f"{_short(left)} → {_short(right)}"
    if isinstance(stored, dict) and isinstance(asked, dict):
        names = [name for name in stored | asked if stored.get(name) != asked.get(name)]
        return ", ".join(f"{name} {_short(stored.get(name))} → {_short(asked.get(name))}" for name in names[:2])
    return f"{_short(stored)} → {_short(asked)}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "there"
    if isinstance(value, list):
        return ", ".join(map(str, value[:3])) + (f" and {len(value) - 3} more" if len(value) > 3 else "") or "nothing"
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def refuse_again(made: PassFile, layout: Layout) -> None:
    """Raise InvalidInput where a new pass would make what another pass has made."""
    for artifact in made.artifacts:
        if artifact in layout.artifacts:
            raise InvalidInput(
                explain(
                    f"{artifact} is stored already, by pass {layout.artifacts[artifact]}",
                    accepted="what the store does not have yet",
                    next_step=f"leave it out, or first: actstore drop STORE {artifact}",
                )
            )


def refuse_dropped(passing: PassWriter, again: str) -> None:
    """Raise InvalidInput where a pass is done but something of it was dropped: its recipe cannot make it again.

    again: how to have it again.
    """
    owned = passing.writer.layout.artifacts
    gone = [one for one in passing.made.artifacts if owned.get(one) != passing.pass_id]
    if any(one.startswith("attention/") for one in gone):
        again = f"drop the other layers of attention too, which one command makes together; then {again}"
    if gone:
        raise InvalidInput(
            explain(
                f"{', '.join(gone)} was made by this command and dropped since; the rest is complete",
                next_step=f"to have it again, {again}",
            )
        )
