"""The proof of SAEs before a pass begins: does each explain the site it claims, better than any site near it?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from actstore.errors import Unhealthy, explain
from actstore.health import HealthCheck
from actstore.saes import Encoder, LayerSums, SaeEncoder, coders_together, compete, sae_health, unproved
from actstore.sites import Site, parse_site

if TYPE_CHECKING:
    import torch

__all__ = ["PlainRows", "prove_saes"]

STOPS = frozenset({"sae_site", "sae_fvu", "sae_finite_rows"})  # what ends a run; other failures are recorded and shown


class PlainRows(Protocol):
    """The first plain rows of a corpus, wherever their numbers come from: the model, or what is stored of it."""

    @property
    def among(self) -> str:
        """What the sites are, for a sentence: all of the model, or those that are stored."""

    def sites(self) -> Sequence[Site]:
        """Return every site that an SAE may be proved at."""

    def site_width(self, site: Site) -> int:
        """Return the width of a site."""

    def at(self, sites: set[Site]) -> dict[Site, torch.Tensor]:
        """Return the rows at each site: (row, width), on the encoders' device; the same rows at all."""


def prove_saes(source: PlainRows, encoders: Sequence[Encoder], *, allow_unhealthy: bool) -> list[HealthCheck]:
    """Return what the first plain rows prove of every SAE, at its own sites and at those of equal width around them.

    Where there are no others nothing is proved of its site. Raises Unhealthy, naming the better site, where another
    site wins or the FVU exceeds 1, unless `allow_unhealthy`.
    """
    coders = [encoder for encoder in encoders if isinstance(encoder, SaeEncoder)]  # neurons are their own site
    checks: list[HealthCheck] = []
    # A layer at a time: the rivals of all layers together could be larger than the device.
    for layer in sorted({_own(encoder).depth[0] for encoder in coders}):
        here = [encoder for encoder in coders if _own(encoder).depth[0] == layer]
        wanted = {site for encoder in here for sites in _rivals(source, encoder) for site in sites}
        rows = source.at(wanted)
        for encoder in here:
            reads, writes = ({site: rows[site] for site in sites} for sites in _rivals(source, encoder))
            written = encoder.identity.write_site
            targets = writes[parse_site(written)] if written else None
            checks += sae_health(encoder, reads[_own(encoder)], targets)
            checks += [] if encoder.coder.is_partial else _competition(source, encoder, reads, writes)
    checks += _proof_of_sums(source, coders)
    failed = [check for check in checks if check.ok is False and check.name in STOPS]
    if failed and not allow_unhealthy:
        raise Unhealthy(_message(failed))
    return checks


def _competition(
    source: PlainRows, encoder: SaeEncoder, reads: Mapping[Site, torch.Tensor], writes: Mapping[Site, torch.Tensor]
) -> list[HealthCheck]:
    checks = compete(encoder, reads, writes, among=source.among)
    if len(checks) > 1:
        return checks
    why = f"not proved: of {source.among} no other is of its width and within a layer"
    return [replace(check, expected=why, ok=None) for check in checks]


def _proof_of_sums(source: PlainRows, coders: Sequence[SaeEncoder]) -> Iterator[HealthCheck]:
    """Yield what is proved of coders of several layers together; their lowest layer is a coder like any other."""
    for whole, others in coders_together(coders):
        sums = LayerSums(len(whole))
        for encoder in whole if len(whole) > 1 else ():
            own, written = _own(encoder), parse_site(encoder.identity.write_site or encoder.identity.site)
            rows = source.at({own, written})
            check = sums.add(encoder, rows[own], rows[written])
            if encoder.coder.is_partial:
                yield check
        yield from (unproved(encoder, whole) for encoder in others)


def _own(encoder: SaeEncoder) -> Site:
    return parse_site(encoder.identity.site)


def _rivals(source: PlainRows, encoder: SaeEncoder) -> tuple[list[Site], list[Site]]:
    """Return the sites that an SAE could read and, of a transcoder, write: its own, and those of its width near it."""
    written = encoder.identity.write_site
    reads = _around(source, _own(encoder), encoder.coder.d_in)
    return reads, _around(source, parse_site(written), encoder.coder.d_out) if written else []


def _around(source: PlainRows, own: Site, width: int) -> list[Site]:
    """Return every site of a width within one layer, patterns apart; the embedding is the layer before the first."""
    near = [site for site in source.sites() if abs(site.depth[0] - own.depth[0]) <= 1 and site.kind != "pattern"]
    return [site for site in near if source.site_width(site) == width]


def _spelled(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"


def _message(failed: Sequence[HealthCheck]) -> str:
    # Of a lost competition the declared site's own verdict says all: it names the better site.
    failed = [check for check in failed if check.name != "sae_site" or "lowest of " in check.expected] or failed
    shown = "; ".join(
        f"{check.name} of {check.subject} is {_spelled(check.value)}, expected {check.expected}" for check in failed
    )
    return explain(
        f"{len(failed)} check{'s' * (len(failed) > 1)} of the SAEs failed: {shown}",
        next_step="correct the SAE's @SITE (@READ>WRITE) or its model; --allow-unhealthy stores it all the same, and "
        "records this",
    )
