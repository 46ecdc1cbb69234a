"""The proof of SAEs before a pass begins: does each explain the site it claims, better than any site near it?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from actstore.blocks import TokenShard, is_plain
from actstore.errors import Unhealthy, explain
from actstore.health import HealthCheck
from actstore.models import LoadedModel
from actstore.recipe import Recipe
from actstore.saes import (
    ROWS_NEEDED,
    Encoder,
    LayerSums,
    SaeEncoder,
    coders_together,
    compete,
    sae_health,
    unproved,
)
from actstore.sites import Site, parse_site

from .batches import sequences_of
from .runner import ShardRunner

if TYPE_CHECKING:
    import torch

__all__ = ["prove_saes"]

PROOF_ROWS = 4096  # run for the proof where all are plain; it needs 1,024 plain ones
MOST_PIECES = 16  # of PROOF_ROWS rows each: overlapping windows have few plain rows
STOPS = frozenset({"sae_site", "sae_fvu", "sae_finite_rows"})  # what ends a run; other failures are recorded and shown


def prove_saes(
    model: LoadedModel,
    encoders: Sequence[Encoder],
    recipe: Recipe,
    shards: Iterable[TokenShard],
    batch_tokens: int,
    *,
    allow_unhealthy: bool,
) -> list[HealthCheck]:
    """Return what the first plain rows prove of every SAE, at its own sites and at those of equal width around them.

    Raises Unhealthy, naming the better site, where another site wins or the FVU exceeds 1, unless `allow_unhealthy`.
    """
    coders = [encoder for encoder in encoders if isinstance(encoder, SaeEncoder)]  # neurons are their own site
    if not coders:
        return []
    pieces = _pieces(shards)
    checks: list[HealthCheck] = []
    # A layer at a time: the rivals of all layers together could be larger than the device.
    for layer in sorted({_own(encoder).depth[0] for encoder in coders}):
        here = [encoder for encoder in coders if _own(encoder).depth[0] == layer]
        wanted = {site for encoder in here for sites in _rivals(model, encoder) for site in sites}
        rows = _plain_rows(model, recipe, pieces, wanted, batch_tokens)
        for encoder in here:
            reads, writes = ({site: rows[site] for site in sites} for sites in _rivals(model, encoder))
            written = encoder.identity.write_site
            targets = writes[parse_site(written)] if written else None
            checks += sae_health(encoder, reads[_own(encoder)], targets)
            checks += [] if encoder.coder.is_partial else compete(encoder, reads, writes)
    checks += _proof_of_sums(model, coders, recipe, pieces, batch_tokens)
    failed = [check for check in checks if check.ok is False and check.name in STOPS]
    if failed and not allow_unhealthy:
        raise Unhealthy(_message(failed))
    return checks


def _proof_of_sums(
    model: LoadedModel, coders: Sequence[SaeEncoder], recipe: Recipe, pieces: Sequence[TokenShard], batch_tokens: int
) -> Iterator[HealthCheck]:
    """Yield what is proved of coders of several layers together; their lowest layer is a coder like any other."""
    for whole, others in coders_together(coders):
        sums = LayerSums(len(whole))
        for encoder in whole if len(whole) > 1 else ():
            own, written = _own(encoder), parse_site(encoder.identity.write_site or encoder.identity.site)
            rows = _plain_rows(model, recipe, pieces, {own, written}, batch_tokens)
            check = sums.add(encoder, rows[own], rows[written])
            if encoder.coder.is_partial:
                yield check
        yield from (unproved(encoder, whole) for encoder in others)


def _own(encoder: SaeEncoder) -> Site:
    return parse_site(encoder.identity.site)


def _plain_rows(
    model: LoadedModel, recipe: Recipe, pieces: Sequence[TokenShard], sites: set[Site], batch_tokens: int
) -> dict[Site, torch.Tensor]:
    """Return the plain rows of all pieces at each site: (row, width), on the device."""
    import torch

    parts: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
    for piece in pieces:
        runner = ShardRunner(model, (), recipe, len(piece.values), batch_tokens)
        runner.capture(piece, sorted(sites, key=lambda site: site.depth))
        plain = torch.from_numpy(np.flatnonzero(is_plain(piece.column("flags")))).to(model.device)
        for site in sites:
            parts[site].append(runner.rows(site).index_select(0, plain))
    return {site: torch.cat(found) for site, found in parts.items()}


def _rivals(model: LoadedModel, encoder: SaeEncoder) -> tuple[list[Site], list[Site]]:
    """Return the sites that an SAE could read and, of a transcoder, write: its own, and those of its width near it."""
    written = encoder.identity.write_site
    reads = _around(model, _own(encoder), encoder.coder.d_in)
    return reads, _around(model, parse_site(written), encoder.coder.d_out) if written else []


def _around(model: LoadedModel, own: Site, width: int) -> list[Site]:
    """Return every site of a width within one layer, patterns apart; the embedding is the layer before the first."""
    near = [site for site in model.sites() if abs(site.depth[0] - own.depth[0]) <= 1 and site.kind != "pattern"]
    return [site for site in near if model.site_width(site) == width]


def _pieces(shards: Iterable[TokenShard]) -> list[TokenShard]:
    """Return the first whole sequences of the corpus, filler left out, in pieces of at most PROOF_ROWS rows.

    So many pieces that they have PROOF_ROWS rows and ROWS_NEEDED plain ones, but no more than MOST_PIECES.
    """
    pieces: list[TokenShard] = []
    n_rows = n_plain = 0
    for piece in (piece for shard in shards for piece in _cut(shard)):
        pieces.append(piece)
        n_rows += len(piece.values)
        n_plain += int(is_plain(piece.column("flags")).sum())
        if (n_rows >= PROOF_ROWS and n_plain >= ROWS_NEEDED) or len(pieces) == MOST_PIECES:
            break
    return pieces


def _cut(shard: TokenShard) -> Iterator[TokenShard]:
    """Yield consecutive whole sequences of a shard, at most PROOF_ROWS rows of them but at least one sequence."""
    bounds = [0, *np.cumsum(sequences_of(shard).lengths).tolist()]
    first = 0
    for place in range(1, len(bounds)):
        is_last = place == len(bounds) - 1
        if is_last or bounds[place + 1] - bounds[first] > PROOF_ROWS:
            yield TokenShard(shard.shard, shard.values[bounds[first] : bounds[place]])
            first = place


def _spelled(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"


def _message(failed: Sequence[HealthCheck]) -> str:
    # Of a lost competition the declared site's own verdict says all: it names the better site.
    failed = [check for check in failed if check.name != "sae_site" or "lowest of all" in check.expected] or failed
    shown = "; ".join(
        f"{check.name} of {check.subject} is {_spelled(check.value)}, expected {check.expected}" for check in failed
    )
    return explain(
        f"{len(failed)} check{'s' * (len(failed) > 1)} of the SAEs failed: {shown}",
        next_step="correct the SAE's @SITE (@READ>WRITE) or its model; --allow-unhealthy stores it all the same, and "
        "records this",
    )
