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
from actstore.saes import ROWS_NEEDED, SaeEncoder, compete, sae_health
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
    encoders: Sequence[SaeEncoder],
    recipe: Recipe,
    shards: Iterable[TokenShard],
    batch_tokens: int,
    *,
    allow_unhealthy: bool,
) -> list[HealthCheck]:
    """Return what the first plain rows prove of every SAE, at its own site and at those of equal width around it.

    Raises Unhealthy, naming the better site, where another site wins or the FVU exceeds 1, unless `allow_unhealthy`.
    """
    if not encoders:
        return []
    pieces = _pieces(shards)
    checks: list[HealthCheck] = []
    # A layer at a time: the rivals of all layers together could be larger than the device.
    for layer in sorted({_own(encoder).depth[0] for encoder in encoders}):
        here = [encoder for encoder in encoders if _own(encoder).depth[0] == layer]
        rivals = {encoder.identity.sae: _rivals(model, encoder) for encoder in here}
        rows = _plain_rows(model, recipe, pieces, {site for sites in rivals.values() for site in sites}, batch_tokens)
        for encoder in here:
            candidates = {site: rows[site] for site in rivals[encoder.identity.sae]}
            checks += sae_health(encoder, candidates[_own(encoder)]) + compete(encoder, candidates)
    failed = [check for check in checks if check.ok is False and check.name in STOPS]
    if failed and not allow_unhealthy:
        raise Unhealthy(_message(failed))
    return checks


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


def _rivals(model: LoadedModel, encoder: SaeEncoder) -> list[Site]:
    """Return the SAE's own site and every other of its width within one layer."""
    own = parse_site(encoder.identity.site)
    return [site for site in model.sites() if model.site_width(site) == encoder.coder.d_in and _near(site, own)]


def _near(site: Site, own: Site) -> bool:
    if site.layer is None or own.layer is None:
        return site == own
    return abs(site.layer - own.layer) <= 1


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
        next_step="correct the SAE's @SITE or its model; --allow-unhealthy stores it all the same, and records this",
    )
