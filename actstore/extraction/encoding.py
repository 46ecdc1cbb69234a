"""New coders over stored sites, without the model: this is the story of `actstore encode`."""

from __future__ import annotations

import shlex
from collections.abc import Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import chain

from actstore.errors import MissingInput, explain
from actstore.health import HealthCheck
from actstore.models import choose_device
from actstore.progress import Report, silent
from actstore.recipe import Recipe, SaeIdentity, refuse_same_ids
from actstore.saes import (
    ENCODERS,
    Encoder,
    NeuronEncoder,
    ResolvedSae,
    SaeEncoder,
    check_width,
    expand_neurons,
    expand_sae_arguments,
    load_sae,
    without_neurons,
)
from actstore.sites import Site, not_stored, parse_site
from actstore.store import LOCK_SECONDS, FileProof, PassFile, PassWriter, StoreReader, StoreWriter, at_work, exclusive

from .checks import tell_overruled
from .directions import PROJECTED, directions_of, written_site
from .flips import flip_checks
from .identity import pass_id_of, precision_of, refuse_again, refuse_dropped, refuse_pattern
from .kit import sae_weight_bytes, write_feature_logits, write_sae_weights
from .memory import keep_freed_memory
from .plan import Plan, check_disk, estimate
from .planning import firings_a_row, planned_identity
from .proof import prove_saes
from .proof_rows import RowsOfStore
from .request import EncodeRequest
from .shard_encoder import ShardEncoder
from .specs import firings_of, matrices_of
from .stored import StoredSites
from .tiles import largest_tile, sites_of
from .work import Outcome, run_pass

__all__ = ["encode", "plan_encoding"]


def encode(request: EncodeRequest, report: Report = silent) -> Outcome:
    """Encode stored sites with new SAEs and store their firings; resumes where an earlier run ended.

    Of every shard whose sites are stored; the pass is complete when that is all of them.
    Raises ActstoreError for everything that a user can cause; every shard that was finished is kept.
    """
    keep_freed_memory()
    StoreWriter.open(request.store)  # raises where there is none
    encoders = _load(request, StoredSites(StoreReader(request.store), choose_device(request.device)), report)
    with ExitStack() as working:
        with exclusive(request.store, wait_seconds=LOCK_SECONDS):
            writer = StoreWriter.open(request.store)
            writer.repair_metadata()
            # Read again: others may have stored more while the SAEs were loaded.
            stored = StoredSites(StoreReader(request.store), choose_device(request.device))
            recipe = _recipe(request, stored, [encoder.identity for encoder in encoders])
            encoder = ShardEncoder(stored, encoders, recipe)
            shards = stored.done(_sites(encoders))
            _prepare(_Beginning(request, writer, encoder, shards, report))
            working.enter_context(at_work(request.store))
        return run_pass(PassWriter(writer, pass_id_of(recipe)), encoder, report, mixed=request.mixed, shards=shards)


def plan_encoding(request: EncodeRequest) -> Plan:
    """Return what encoding will cost; reads no weights and no stored site."""
    stored = StoredSites(StoreReader(request.store), choose_device("cpu"))
    coders = [planned_identity(one) for one in _resolve(request, stored)] + _neurons(request, stored)
    refuse_same_ids([coder.sae for coder in coders])
    layout = stored.reader.layout
    return _estimate(request, stored, _recipe(request, stored, coders), layout.n_rows, layout.n_shards)


def _resolve(request: EncodeRequest, stored: StoredSites) -> list[ResolvedSae]:
    """Return the SAEs that are asked for; raises where the store does not have a site of one."""
    found = expand_sae_arguments(without_neurons(request.saes), allow_pt=request.allow_pt)
    for site in (site for one in found for site in (one.site, one.write_site) if site is not None):
        stored.must_have(site)
    return found


def _neurons(request: EncodeRequest, stored: StoredSites) -> list[SaeIdentity]:
    return expand_neurons(request.saes, stored.sites(), stored.site_width, request.neurons_top, not_stored)


def _load(request: EncodeRequest, stored: StoredSites, report: Report) -> list[Encoder]:
    """Return the coders, on the device; raises where one cannot read the stored sites."""
    resolved, neurons = _resolve(request, stored), _neurons(request, stored)
    refuse_same_ids([*(one.sae for one in resolved), *(one.sae for one in neurons)])
    tell_overruled(resolved, report)
    encoders: list[Encoder] = []
    for coder in map(load_sae, resolved):
        identity, written = coder.identity, coder.identity.write_site
        refuse_pattern(identity)
        d_out = stored.site_width(parse_site(written)) if written else None
        check_width(coder, stored.site_width(parse_site(identity.site)), d_out)
        report(f"SAE {identity.sae}: {coder.d_sae} features of stored {identity.site}", 0, None, "")
        encoders.append(ENCODERS[request.sae_precision](coder, stored.device))
    return encoders + [NeuronEncoder(identity) for identity in neurons]


def _sites(encoders: Sequence[Encoder]) -> set[Site]:
    return set(chain.from_iterable(map(sites_of, encoders)))


def _recipe(request: EncodeRequest, stored: StoredSites, coders: Sequence[SaeIdentity]) -> Recipe:
    """Return the recipe: the model and corpus of the passes that stored the sites, and these passes themselves."""
    sites = {parse_site(site) for coder in coders for site in (coder.site, coder.write_site) if site}
    sources = stored.sources(sites)
    begun = stored.recipe_of(parse_site(sources[0].site))
    return Recipe(
        model=begun.model,
        corpus=begun.corpus,
        saes=tuple(coders),
        predictions=False,
        activation_bits=request.activation_bits,
        sae_precision=precision_of(coders, request.sae_precision),
        encode_special=request.encode_special,
        tile_rows=largest_tile(begun.corpus.shard_rows),
        sources=sources,
    )


def _estimate(request: EncodeRequest, stored: StoredSites, recipe: Recipe, n_rows: int, n_shards: int) -> Plan:
    return estimate(
        n_documents=stored.reader.layout.n_docs,
        n_rows=n_rows,
        n_shards=n_shards,
        matrices=matrices_of(recipe, stored.site_width),
        firings=firings_of(recipe),
        l0={coder.sae: firings_a_row(coder) for coder in recipe.saes},
        kit_bytes=sae_weight_bytes(recipe, stored.site_width) if request.sae_weights else 0,
        with_corpus=False,
        out=request.store,
    )


@dataclass(frozen=True)
class _Beginning:
    """Everything that is known before the first shard; needs the store's lock."""

    request: EncodeRequest
    writer: StoreWriter
    encoder: ShardEncoder
    shards: Sequence[int]  # those whose sites are stored
    report: Report


def _prepare(beginning: _Beginning) -> None:
    """Begin the pass if it is new, else add to its kit what was left out; raises NoSpace where the disk is too full."""
    request, writer, encoder = beginning.request, beginning.writer, beginning.encoder
    pass_id = pass_id_of(encoder.recipe)
    passing = PassWriter(writer, pass_id) if pass_id in writer.layout.passes else None
    if passing and (pieces := _kit(request, encoder, without=passing.made.kit)):
        writer.add_to_kit(pass_id, pieces)
    pending = passing.pending() if passing else range(writer.layout.n_shards)
    if passing and not pending:
        refuse_dropped(passing, f"encode it alone: actstore encode {shlex.quote(str(writer.root))} SAE")
        return
    n_rows = int(encoder.stored.reader.rows_used[list(pending)].sum())
    plan = _estimate(request, encoder.stored, encoder.recipe, n_rows, len(pending))
    beginning.report(f"plan: {plan}", 0, None, "")
    check_disk(plan, force=request.force)
    if passing is None:
        _begin(beginning)


def _begin(beginning: _Beginning) -> None:
    """Prove the SAEs over what is stored, write kit and feature logits, and declare the pass."""
    request, writer, encoder = beginning.request, beginning.writer, beginning.encoder
    recipe, stored, encoders = encoder.recipe, encoder.stored, encoder.encoders
    matrices, firings = matrices_of(recipe, stored.site_width), firings_of(recipe)
    refuse_again(PassFile(recipe.to_json(), matrices, firings), writer.layout)
    if not beginning.shards:
        names = ", ".join(source.site for source in recipe.sources)
        next_step = "finish the extraction: run the same `actstore extract` command again"
        raise MissingInput(explain(f"No shard of {names} is stored yet", next_step=next_step))
    beginning.report("proving SAEs", 0, None, "")
    rows = RowsOfStore(stored, beginning.shards)
    checks = prove_saes(rows, encoders, allow_unhealthy=request.allow_unhealthy)
    checks += [*flip_checks(encoder, beginning.shards), *_missing_logits(encoder)]
    made = PassFile(
        recipe=recipe.to_json(),
        matrices=matrices,
        firings=firings,
        kit=_kit(request, encoder),
        files=_feature_logits(request, encoder),
        health=tuple(check.to_json() for check in checks),
    )
    writer.begin_pass(pass_id_of(recipe), made)


def _kit(request: EncodeRequest, encoder: ShardEncoder, without: Container[str] = ()) -> dict[str, str]:
    """Return the kit: the pieces of the passes that stored the sites, and the weights of the SAEs."""
    pieces: dict[str, str] = {}
    for one in encoder.encoders:
        pieces = {**encoder.stored.kit(written_site(one)), **pieces}
        name = f"sae/{one.identity.sae}"
        if request.sae_weights and isinstance(one, SaeEncoder) and name not in without:
            pieces[name] = write_sae_weights(request.store, one.coder)
    return {name: digest for name, digest in pieces.items() if name not in without}


def _feature_logits(request: EncodeRequest, encoder: ShardEncoder) -> dict[str, FileProof]:
    stored, files = encoder.stored, dict[str, FileProof]()
    unembedding = cache(lambda digest: stored.unembedding_by(digest))  # it may be as large as the model
    for one in encoder.encoders:
        site, sae = written_site(one), one.identity.sae
        directions = directions_of(stored.way(site), one, stored.device)
        if directions is not None:
            found = unembedding(stored.unembedding_digest(site))
            files |= write_feature_logits(request.store, found, {sae: directions})
    return files


def _missing_logits(encoder: ShardEncoder) -> list[HealthCheck]:
    """Return what is not ok with the feature logits: the kit of a store that is older may lack what they need."""
    return [
        HealthCheck(
            "sae_feature_logits",
            one.identity.sae,
            None,
            f"not computed: the kit has no output/{site}; run the `actstore extract` command that stored it again",
            None,
        )
        for one in encoder.encoders
        if (site := written_site(one)).kind in PROJECTED and encoder.stored.way(site) is None
    ]
