"""The proof of SAEs before a pass begins: does each explain the site it claims, better than any site near it?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from actstore.blocks import TokenShard, is_plain
from actstore.errors import Unhealthy, explain
from actstore.health import HealthCheck
from actstore.models import LoadedModel
from actstore.recipe import Recipe
from actstore.saes import SaeEncoder, compete, sae_health
from actstore.sites import Site, parse_site

from .batches import sequences_of
from .runner import ShardRunner

__all__ = ["prove_saes"]

PROOF_ROWS = 4096  # at most this many rows run for the proof; it needs 1,024 plain ones


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

    Raises Unhealthy where a check fails, naming the better site, unless `allow_unhealthy`.
    """
    if not encoders:
        return []
    head = _head(shards)
    runner = ShardRunner(model, encoders, recipe, len(head.values), batch_tokens)
    rivals = {encoder.coder.identity.sae: _rivals(model, encoder) for encoder in encoders}
    runner.capture(head, sorted({site for sites in rivals.values() for site in sites}, key=lambda site: site.depth))
    plain = np.flatnonzero((head.column("token_id") >= 0) & is_plain(head.column("flags")))
    checks: list[HealthCheck] = []
    for encoder in encoders:
        checks += _prove(runner, encoder, rivals[encoder.coder.identity.sae], plain)
    failed = [check for check in checks if check.ok is False]
    if failed and not allow_unhealthy:
        raise Unhealthy(_message(failed))
    return checks


def _prove(
    runner: ShardRunner, encoder: SaeEncoder, rivals: Sequence[Site], plain: npt.NDArray[np.int64]
) -> list[HealthCheck]:
    import torch

    index = torch.from_numpy(plain).to(runner.model.device)
    rows = {site: runner.rows(site).index_select(0, index) for site in rivals}
    own = rows[parse_site(encoder.coder.identity.site)]
    return sae_health(encoder, own) + compete(encoder, rows)


def _rivals(model: LoadedModel, encoder: SaeEncoder) -> list[Site]:
    """Return the SAE's own site and every other of its width within one layer."""
    own = parse_site(encoder.coder.identity.site)
    return [site for site in model.sites() if model.site_width(site) == encoder.coder.d_in and _near(site, own)]


def _near(site: Site, own: Site) -> bool:
    if site.layer is None or own.layer is None:
        return site == own
    return abs(site.layer - own.layer) <= 1


def _head(shards: Iterable[TokenShard]) -> TokenShard:
    """Return the first whole sequences of the corpus, filler left out: at most PROOF_ROWS rows but one sequence."""
    parts: list[npt.NDArray[np.int32]] = []
    for shard in shards:
        parts.append(shard.values[: shard.n_rows])
        if sum(map(len, parts)) >= PROOF_ROWS:
            break
    together = TokenShard(0, np.concatenate(parts))
    ends = np.cumsum(sequences_of(together).lengths)
    n_rows = int(ends[max(0, int(np.searchsorted(ends, PROOF_ROWS, side="right")) - 1)])
    return TokenShard(0, together.values[:n_rows])


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
