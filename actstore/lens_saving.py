"""Storing what a lens says at stored residual streams, without the model: the story of `actstore save-lens`."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InvalidInput, MissingInput, explain
from .health import HealthCheck
from .progress import Report, silent
from .recipe import Recipe
from .sealed import digest_of
from .sites import Site, expand_sites, not_stored, parse_site
from .store import LOCK_SECONDS, PassFile, PassWriter, StoreReader, StoreWriter, at_work, exclusive

if TYPE_CHECKING:
    from .extraction.shard_lens import ShardLens, Translate
    from .extraction.stored import StoredSites
    from .extraction.work import Outcome
    from .lenses.tuned import TunedLens

__all__ = ["LensRequest", "save_lens"]

LOGIT = "logit"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class LensRequest:
    """Everything that `actstore save-lens` can be told; `tuned` is the folder of a tuned lens, None the logit lens."""

    store: Path
    tuned: Path | None = None
    name: str | None = None  # of a tuned lens in the store; None: its folder's
    sites: tuple[str, ...] = ()  # none: every stored site that the lens reads and that lacks it
    k: int = 5
    device: str = "auto"
    mixed: bool = False
    allow_pt: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InvalidInput(explain(f"k is {self.k}", accepted="how many tokens to keep of a row, 1 or more"))
        if self.tuned is None and self.name not in (None, LOGIT):
            raise InvalidInput(explain(f"The logit lens cannot be called {self.name!r}", accepted="a name of --tuned"))
        if self.tuned is not None and (self.lens_name == LOGIT or not NAME.fullmatch(self.lens_name)):
            accepted = f"letters, digits, '.', '_', '-', and not {LOGIT!r}"
            what = f"A tuned lens cannot be called {self.lens_name!r}"
            raise InvalidInput(explain(what, accepted=accepted, next_step="give it a --name"))

    @property
    def lens_name(self) -> str:
        """What the lens is called in the store."""
        if self.tuned is None:
            return LOGIT
        return self.name or Path(self.tuned).expanduser().resolve().name


def save_lens(request: LensRequest, report: Report = silent) -> Outcome:
    """Read stored residual streams through a lens and store its read-outs; resumes where an earlier run ended.

    What is stored is what extraction's `lens_k` stores: target rank and log-probability, entropy, KL to the model's
    own distribution (which is the last stored resid_post, read out), and the k likeliest tokens.
    Raises MissingInput where the last resid_post is not stored, UnknownName for sites that are not, InvalidInput for a
    site that the lens does not read or that has it already, and a lens of another model.
    """
    from .extraction.identity import pass_id_of
    from .extraction.stored import StoredSites
    from .extraction.work import run_pass
    from .lenses.tuned import TunedLens
    from .models import choose_device

    lens = None if request.tuned is None else TunedLens.open(request.tuned, allow_pt=request.allow_pt)
    StoreWriter.open(request.store)  # raises where there is none
    with ExitStack() as working:
        with exclusive(request.store, wait_seconds=LOCK_SECONDS):
            writer = StoreWriter.open(request.store)
            writer.repair_metadata()
            stored = StoredSites(StoreReader(request.store), choose_device(request.device))
            maker = _maker(request, stored, lens)
            read = {maker.final, *map(parse_site, maker.recipe.lens_sites)}
            _prepare(request, writer, maker, report)
            working.enter_context(at_work(request.store))
        passing = PassWriter(writer, pass_id_of(maker.recipe))
        return run_pass(passing, maker, report, mixed=request.mixed, shards=stored.done(read))


def _maker(request: LensRequest, stored: StoredSites, lens: TunedLens | None) -> ShardLens:
    """Return what reads the store's shards; raises as `save_lens`."""
    from .extraction.shard_lens import ShardLens

    facts = stored.reader.store.model["facts"]
    final = Site("resid_post", int(facts["n_layers"]) - 1)
    if final not in stored.sites():
        raise MissingInput(
            explain(
                f"{final} is not stored, and the model's own distribution is computed from it",
                next_step=f"actstore extract MODEL --into {shlex.quote(str(request.store))} --site {final}",
            )
        )
    if request.k > facts["vocabulary_size"]:
        raise InvalidInput(explain(f"k is {request.k}", accepted=f"at most {facts['vocabulary_size']} tokens"))
    digest = None if lens is None else _digest(lens)
    sites = _sites(request, stored, lens, digest)
    unembedding = stored.unembedding_digest(final)
    for site in sites:
        if stored.unembedding_digest(site) != unembedding:
            what = f"{site} was stored by a pass with another unembedding than {final}, in another dtype for example"
            raise InvalidInput(explain(what, next_step="choose others with --site"))
        if lens is not None:
            lens.check(stored.reader, str(site))
    recipe = _recipe(request, stored, final, sites, digest)
    translators = {} if lens is None else _translators(lens, sites, stored)
    return ShardLens(stored, recipe, final, stored.unembedding_by(unembedding), translators)


def _digest(lens: TunedLens) -> str:
    """Return the identity of a tuned lens: all that changes what it says."""
    with lens.file.open("rb") as file:
        translators = hashlib.file_digest(file, "sha256").hexdigest()
    return digest_of({"translators": translators, "has_bias": lens.config.has_bias})


def _sites(request: LensRequest, stored: StoredSites, lens: TunedLens | None, digest: str | None) -> tuple[Site, ...]:
    """Return the sites to read: those asked for, else those that lack this lens, else those of the pass that has it."""
    readable = [site for site in stored.sites() if site.kind.startswith("resid_") and (not lens or lens.reads(site))]
    if request.sites:
        chosen = expand_sites(request.sites, stored.sites(), not_stored)
        if unread := [str(site) for site in chosen if site not in readable]:
            what = f"The lens {request.lens_name} cannot read {', '.join(unread)}"
            raise InvalidInput(explain(what, accepted=", ".join(map(str, readable)) or "none of the stored sites"))
        return chosen
    artifacts = stored.reader.layout.artifacts
    if lacking := [site for site in readable if f"lens/{request.lens_name}/{site}" not in artifacts]:
        return tuple(lacking)
    if begun := _begun(request, stored, digest):
        return begun
    raise InvalidInput(
        explain(
            f"Every stored site that the lens {request.lens_name} reads has it, in another way than was asked for",
            next_step=f"drop one first: actstore drop {shlex.quote(str(request.store))} lens/{request.lens_name}/SITE",
        )
    )


def _begun(request: LensRequest, stored: StoredSites, digest: str | None) -> tuple[Site, ...]:
    """Return the sites of a pass that was begun for this lens: of one that is not complete, else of the last."""
    reader, wanted = stored.reader, (request.lens_name, digest, request.k)
    passes = {one: Recipe.from_json(made.recipe) for one, made in reader.passes.items()}
    same = {
        one: recipe
        for one, recipe in passes.items()
        if recipe.sources and recipe.lens_sites and (recipe.lens_name, recipe.lens_digest, recipe.lens_k) == wanted
    }
    ordered = sorted(same, key=lambda one: len(reader.receipts[one]) == reader.layout.n_shards)
    unfinished = [one for one in ordered if len(reader.receipts[one]) < reader.layout.n_shards]
    chosen = (unfinished or ordered[-1:])[:1]
    return tuple(parse_site(site) for one in chosen for site in same[one].lens_sites)


def _recipe(
    request: LensRequest, stored: StoredSites, final: Site, sites: Sequence[Site], digest: str | None
) -> Recipe:
    """Return the recipe: the model and corpus of the pass that stored the final site, and all that is read."""
    begun = stored.recipe_of(final)
    return Recipe(
        model=begun.model,
        corpus=begun.corpus,
        predictions=False,
        lens_k=request.k,
        lens_sites=tuple(map(str, sites)),
        compute_dtype=begun.compute_dtype,  # of the unembedding
        storage_dtype=begun.compute_dtype,
        tile_rows=begun.tile_rows,
        sources=stored.sources({final, *sites}),
        lens_name=request.lens_name,
        lens_digest=digest,
    )


def _translators(lens: TunedLens, sites: Sequence[Site], stored: StoredSites) -> dict[Site, Translate]:
    """Return what the lens does to each site's rows, on the device."""
    import torch

    from .lenses.tuned import translator_of

    def translate(one: Any) -> Translate:
        weight, bias = (torch.from_numpy(array).to(stored.device) for array in (one.weight, one.bias))
        return lambda rows: (exact := rows.float()) + torch.addmm(bias, exact, weight.T)

    numbers = {site: translator_of(site, lens.config.n_layers) for site in sites}
    needed = sorted({number for number in numbers.values() if number is not None})
    made = {number: translate(one) for number, one in lens.translators(needed)}
    return {site: made[number] for site, number in numbers.items() if number is not None}


def _prepare(request: LensRequest, writer: StoreWriter, maker: ShardLens, report: Report) -> None:
    """Begin the pass if it is new; raises NoSpace where the disk may not hold what is still to be made."""
    from .extraction.identity import pass_id_of, refuse_again, refuse_dropped
    from .extraction.plan import check_disk, estimate
    from .extraction.specs import matrices_of

    recipe, stored, pass_id = maker.recipe, maker.stored, pass_id_of(maker.recipe)
    passing = PassWriter(writer, pass_id) if pass_id in writer.layout.passes else None
    pending = passing.pending() if passing else range(writer.layout.n_shards)
    if passing and not pending:
        refuse_dropped(passing, f"ask for it alone: actstore save-lens {shlex.quote(str(writer.root))} --site …")
        return
    made = PassFile(
        recipe=recipe.to_json(),
        matrices=matrices_of(recipe, stored.site_width),
        firings=(),
        kit=stored.kit(maker.final),
        health=tuple(_rounded(maker)),
    )
    n_rows = int(stored.reader.rows_used[list(pending)].sum())
    plan = estimate(
        n_documents=writer.layout.n_docs,
        n_rows=n_rows,
        n_shards=len(pending),
        matrices=made.matrices,
        firings=(),
        l0={},
        kit_bytes=0,
        with_corpus=False,
        out=request.store,
    )
    report(f"plan: {plan}", 0, None, "")
    check_disk(plan, force=request.force)
    if passing is None:
        refuse_again(made, writer.layout)
        writer.begin_pass(pass_id, made)


def _rounded(maker: ShardLens) -> Iterator[dict[str, Any]]:
    """Yield a check for each site whose read-outs differ from extraction's, as its storage rounded what it reads."""
    for site in map(parse_site, maker.recipe.lens_sites):
        rounded = [str(one) for one in (site, maker.final) if not maker.stored.is_exact(one)]
        if rounded:
            why = (
                f"not measured, only the model could tell how near extraction it is; stored with rounding: {rounded[0]}"
            )
            yield HealthCheck("lens_rounding", f"{maker.recipe.lens_name} @ {site}", None, why, None).to_json()
