"""Proof that an SAE reads the site it claims and writes the one it claims, from the first plain rows of a run.

FVU, the fraction of variance unexplained, is Σ‖y − x_hat‖² / Σ‖y − mean‖² over the rows y that are reconstructed, with
their mean per dimension. Nothing raises when an SAE is fed the wrong tensor, but its FVU says so: it explains its own
site and no other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from actstore.errors import InvalidInput, explain
from actstore.health import HealthCheck
from actstore.sites import Site, parse_site

from .coder import SparseCoder
from .encoder import SaeEncoder

if TYPE_CHECKING:
    import torch

__all__ = ["ROWS_NEEDED", "WINS_BELOW", "compete", "sae_health"]

ROWS_NEEDED = 1024  # with fewer plain rows nothing is proved
WINS_BELOW = 0.95  # another site wins with less than this share of the declared site's FVU
FAR = 2.0  # on ROWS_NEEDED rows, times the declared site's FVU: a site as bad as this is not asked on the others
L0_FACTOR = 3.0  # L0 follows the text; a wrong site is off by far more (7 for 34, 2 for 23, thousands for 50)
NORM_TOLERANCE = 0.01  # decoder rows are trained to norm 1
_TILE_ROWS = 1024


@dataclass(frozen=True)
class _Pair:
    """What an SAE would read and write; `write` is None for what reconstructs what it reads."""

    read: Site
    write: Site | None = None

    def __str__(self) -> str:
        return str(self.read) if self.write is None else f"{self.read}>{self.write}"

    def beside(self, declared: _Pair) -> str:
        """Return what is other than declared, for a sentence."""
        if self.write is None:
            return str(self.read)
        parts = [f"reading {self.read}"] if self.read != declared.read else []
        return " and ".join(parts + ([f"writing {self.write}"] if self.write != declared.write else []))


@dataclass(frozen=True)
class _Fit:
    """How well an SAE explains some rows."""

    fvu: float  # NaN where the rows do not vary
    mean_l0: float
    dead_share: float  # features that fired nowhere


def sae_health(encoder: SaeEncoder, plain_rows: torch.Tensor, targets: torch.Tensor | None = None) -> list[HealthCheck]:
    """Return what can be said of an SAE at its site: rows (row, d_in) of any float dtype, plain rows only.

    targets (row, d_out): the same rows of the site that a transcoder writes.

    FVU below 1, mean L0 within a factor of 3 of the declared one, some feature alive, all rows finite; from the weights
    alone decoder rows of norm 1, where they are promised, and positive thresholds, where there are any. With fewer than
    1,024 rows `ok` is None where it depends on them. Decides nothing: the caller refuses what is not ok. Of one layer
    of several, whose reconstruction is a sum over layers, there is no FVU here: see `LayerSums`.
    """
    coder, sae = encoder.coder, encoder.coder.identity.sae
    fit = _fit(encoder, plain_rows, targets)
    declared = coder.identity.declared_l0
    broken = ~plain_rows.isfinite().all(dim=1)
    n_broken = int((broken if targets is None else broken | ~targets.isfinite().all(dim=1)).sum())
    proved = len(plain_rows) >= ROWS_NEEDED

    def by_rows(name: str, value: float, expected: str, ok: bool) -> HealthCheck:
        return HealthCheck(name, sae, value, expected, ok if proved else None)

    checks = [
        HealthCheck("sae_finite_rows", sae, float(n_broken), "0 rows with NaN or infinity", n_broken == 0),
        *([] if coder.is_partial else [by_rows("sae_fvu", fit.fvu, "at most 1", fit.fvu <= 1)]),
        by_rows("sae_dead_share", fit.dead_share, "below 1", fit.dead_share < 1),
        *_weight_checks(coder),
    ]
    if declared is not None:
        near = declared / L0_FACTOR <= fit.mean_l0 <= declared * L0_FACTOR
        checks.append(by_rows("sae_l0", fit.mean_l0, f"{declared:g} within a factor of {L0_FACTOR:g}", near))
    return checks


def _weight_checks(coder: SparseCoder) -> list[HealthCheck]:
    sae, checks = coder.identity.sae, []
    if coder.unit_decoder:
        error = float(np.abs(np.linalg.norm(coder.w_dec, axis=1) - 1).max())
        expected = f"within {NORM_TOLERANCE} of 1"
        checks.append(HealthCheck("sae_decoder_norm", sae, error, expected, error <= NORM_TOLERANCE))
    if coder.identity.architecture.startswith("jumprelu"):
        lowest = float(coder.threshold.min())
        checks.append(HealthCheck("sae_threshold", sae, lowest, "above 0", lowest > 0))
    return checks


def compete(
    encoder: SaeEncoder,
    reads: Mapping[Site, torch.Tensor],
    writes: Mapping[Site, torch.Tensor] | None = None,
    *,
    among: str = "all sites",
) -> list[HealthCheck]:
    """Return the FVU of an SAE at every candidate site, its own among them: (row, d_in) of the same plain rows each.

    writes (row, d_out): the candidates of what a transcoder writes. It competes at every site to read with its own to
    write, at every site to write with its own to read, and with both of its sites in another layer. among: what the
    candidates are, for the message. A site whose FVU on the first 1,024 rows is twice the declared one's there, and no
    less than it would have to be on all rows, keeps that FVU; what is left competes on all rows.
    Not ok is a site that beats the declared one by more than 5 %, and the declared one where its FVU exceeds 1 or
    it is beaten; the message names the better site. With fewer than 1,024 rows `ok` is None.
    Raises InvalidInput where a declared site is not among the candidates.
    """
    identity, writes = encoder.coder.identity, writes or {}
    declared = _Pair(parse_site(identity.site), parse_site(identity.write_site) if identity.write_site else None)
    for site, candidates in ((declared.read, reads), (declared.write, writes)):
        if site and site not in candidates:
            raise InvalidInput(explain(f"The declared site {site} is not among the candidates", accepted=str(site)))
    n_rows = len(reads[declared.read])

    def fvu(pair: _Pair, n_first: int) -> float:
        return _fit(encoder, reads[pair.read][:n_first], writes[pair.write][:n_first] if pair.write else None).fvu

    fvus = {pair: fvu(pair, ROWS_NEEDED) for pair in _pairs(declared, reads, writes)}
    far: set[_Pair] = set()
    if n_rows > ROWS_NEEDED:
        own = fvu(declared, n_rows)
        least, bar = FAR * fvus[declared], WINS_BELOW * own
        far = {pair for pair in fvus if fvus[pair] > least and fvus[pair] >= bar}  # what is not a number is not far
        fvus |= {pair: fvu(pair, n_rows) for pair in fvus.keys() - far - {declared}} | {declared: own}
    return [_verdict(encoder, declared, pair, fvus, far, n_rows >= ROWS_NEEDED, among) for pair in fvus]


def _pairs(declared: _Pair, reads: Iterable[Site], writes: Iterable[Site]) -> list[_Pair]:
    pairs = [_Pair(read, declared.write) for read in reads]
    if declared.write:
        pairs += [_Pair(declared.read, write) for write in writes]
        # A layer too high on both sides looks like no mistake on either.
        pairs += [_Pair(read, write) for read in reads for write in writes if _moved(declared, read, write)]
    return list(dict.fromkeys(pairs))


def _moved(declared: _Pair, read: Site, write: Site) -> bool:
    """Return whether two sites are the declared ones of another layer."""
    own_read, own_write = declared.read, declared.write
    if own_write is None or read.layer is None or own_read.layer is None or own_write.layer is None:
        return False
    step = read.layer - own_read.layer
    return step != 0 and read.kind == own_read.kind and write == Site(own_write.kind, own_write.layer + step)


def _verdict(
    encoder: SaeEncoder,
    declared: _Pair,
    pair: _Pair,
    fvus: Mapping[_Pair, float],
    far: Collection[_Pair],
    proved: bool,
    among: str,
) -> HealthCheck:
    subject, bar = f"{encoder.coder.identity.sae} @ {pair}", WINS_BELOW * fvus[declared]
    if pair != declared:
        seen = f"; on the first {ROWS_NEEDED:,} rows" if pair in far else ""
        expected, ok = f"at least {bar:.4g}, as {declared} is declared{seen}", not fvus[pair] < bar
    else:
        better = min((other for other in fvus if fvus[other] < bar), key=lambda other: fvus[other], default=None)
        beaten = f"; {better.beside(declared)} explains it better (FVU {fvus[better]:.4g})" if better else ""
        expected, ok = f"at most 1, and the lowest of {among} by 5 %{beaten}", fvus[pair] <= 1 and better is None
    return HealthCheck("sae_site", subject, fvus[pair], expected, ok if proved else None)


def _fit(encoder: SaeEncoder, rows: torch.Tensor, targets: torch.Tensor | None = None) -> _Fit:
    import torch

    if not len(rows):
        return _Fit(float("nan"), float("nan"), 1.0)
    written = rows if targets is None else targets
    mean = written.double().mean(dim=0)
    alive = torch.zeros(encoder.coder.d_sae, dtype=torch.bool, device=encoder.device)
    unexplained = variance = firings = 0.0
    for tile in _tiles(len(rows)):
        encoded = encoder.encode(rows[tile], targets=None if targets is None else targets[tile])
        alive[encoded.features.long()] = True
        firings += float(encoded.reconstruction[:, 0].double().sum())
        unexplained += float(encoded.reconstruction[:, 2].double().pow(2).sum())
        variance += float((written[tile].double() - mean).pow(2).sum())
    fvu = unexplained / variance if variance else float("nan")
    return _Fit(fvu, firings / len(rows), 1 - float(alive.float().mean()))


def _tiles(n_rows: int) -> Iterator[slice]:
    return (slice(first, first + _TILE_ROWS) for first in range(0, n_rows, _TILE_ROWS))
