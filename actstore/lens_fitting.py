"""Fitting a tuned lens from a store, without the model: which sites, which rows, and the folder that comes of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .api import Store
from .errors import InvalidInput, MissingInput, UnknownName, explain, unknown_name
from .progress import Report, silent
from .sites import Site, expand_sites, parse_site

if TYPE_CHECKING:
    from .lenses.fitting import Fit, Rows

__all__ = ["FittedSite", "fit_lens", "is_held_out"]

HELD_OUT_ROWS = 8192  # at most: they are kept on the device
BUFFER_SHARDS = 2  # of two sites


@dataclass(frozen=True)
class FittedSite:
    """How a site's translator came out; KL(model ‖ lens) in nats, means over held-out rows."""

    site: str
    translator: int
    kl_logit_lens: float
    kl_tuned_lens: float
    n_steps: int


def fit_lens(
    store: Store,
    out: str | Path,
    *,
    sites: Sequence[str] = ("resid_*",),
    batch_rows: int = 1024,
    held_out: float = 0.1,
    seed: int = 0,
    device: str = "auto",
    report: Report = silent,
    **options: Any,
) -> list[FittedSite]:
    """Fit a tuned lens to stored residual streams, write its folder, and return how well each site came out.

    Needs the last resid_post: through the kit it gives the model's own distribution. Sites between layers have a
    translator each (`actstore.lenses.tuned.translator_of`); others are left out where a pattern names them. `held_out`
    is the share of documents that nothing is fitted to; options are those of `actstore.lenses.fitting.FitOptions`.
    Deterministic in the seed on one machine. Raises MissingInput where the last resid_post is not stored,
    UnknownName for sites that are not, InvalidInput for one made by a pass with another kit or where too little is
    stored, and for a folder that holds a lens.
    """
    import torch

    from .lenses.fitting import FitOptions, fit_translator
    from .models import unembedding_of

    if (Path(out) / "params.safetensors").exists():
        raise InvalidInput(
            explain(f"There is a lens in {out} already", accepted="a new folder", next_step="choose another --out")
        )
    if not 0 < held_out < 1:
        what = f"The share of documents that is held out is {held_out}"
        accepted = "above 0 and below 1: some to fit to and some to measure on"
        raise InvalidInput(explain(what, accepted=accepted, next_step="give --held-out 0.1"))
    settings = FitOptions(**options)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    chosen, final, digest = _sites(store, sites)
    unembedding = unembedding_of(store.reader.kit_piece(digest), device)
    fits: dict[int, Fit] = {}
    for number, site in chosen.items():
        rows = _Rows(store, str(site), final, batch_rows, held_out, seed, device)
        told = _told(report, str(site), settings.n_steps)
        fits[number] = fit_translator(rows.training(), rows.held_out(), unembedding, settings, told)
    settled = {**asdict(settings), "batch_rows": batch_rows, "held_out": held_out, "seed": seed}
    return _write(store, Path(out), chosen, fits, digest, settled)


def _told(report: Report, site: str, n_steps: int) -> Callable[[int, float], None]:
    return lambda step, kl: report(f"fitting {site}", step, n_steps, f"steps, KL {kl:.4f}")


def _sites(store: Store, patterns: Sequence[str]) -> tuple[dict[int, Site], str, str]:
    """Return the site that each translator is fitted to, the final site, and the digest of their unembedding."""
    from .lenses.tuned import translator_of

    reader, n_layers = store.reader, int(store.reader.store.model["facts"]["n_layers"])
    final, stored = Site("resid_post", n_layers - 1), [parse_site(name) for name in store.sites]
    if final not in stored:
        raise MissingInput(
            explain(
                f"{final} is not stored, and the model's own distribution is computed from it",
                next_step=f"actstore extract MODEL --into {shlex.quote(store.url)} --site {final}",
            )
        )
    between = [site for site in stored if site.kind in ("resid_pre", "resid_post") and site != final]
    named = ((translator_of(site, n_layers), site) for site in expand_sites(patterns, between, _not_fitted))
    chosen = {number: site for number, site in named if number is not None}
    digest = reader.kit_digest("unembedding", f"sites/{final}")
    for site in chosen.values():
        if reader.kit_digest("unembedding", f"sites/{site}") != digest:
            what = f"{site} was stored by a pass with another unembedding than {final}, in another dtype for example"
            raise InvalidInput(explain(what, next_step="leave it out with --site"))
    return chosen, str(final), digest


def _not_fitted(wanted: Site | str, available: Iterable[Site]) -> UnknownName:
    """Return the error for a site that no translator is fitted to."""
    next_step = "leave --site out to fit all of these, or store more of the residual stream"
    return unknown_name("stored site that a lens is fitted to:", str(wanted), map(str, available), next_step=next_step)


@dataclass(frozen=True)
class _Rows:
    """Aligned rows of a site and the final one, those of held-out documents apart."""

    store: Store
    site: str
    final: str
    batch_rows: int
    held_out_share: float
    seed: int
    device: str

    def training(self) -> Callable[[], Iterator[Rows]]:
        """Return what gives an epoch of rows to fit to, each time it is called the next one."""
        loader = self._loader()
        return lambda: self._chosen(loader, held_out=False)

    def held_out(self) -> Rows:
        """Return rows of held-out documents, at most HELD_OUT_ROWS; raises InvalidInput where there are none."""
        import torch

        from .lenses.fitting import Rows

        parts, n_rows = [], 0
        for rows in self._chosen(self._loader(), held_out=True):
            parts.append(rows)
            n_rows += len(rows.site)
            if n_rows >= HELD_OUT_ROWS:
                break
        if not n_rows:
            what = f"A share of {self.held_out_share} of the documents holds none out"
            raise InvalidInput(explain(what, accepted="above 0 and below 1", next_step="raise --held-out"))
        site, final = (torch.cat([getattr(rows, name) for rows in parts]) for name in ("site", "final"))
        return Rows(site[:HELD_OUT_ROWS], final[:HELD_OUT_ROWS])

    def _loader(self) -> Any:
        sites = [self.site, self.final]
        return self.store.loader(sites, self.batch_rows, self.seed, dtype="stored", buffer_shards=BUFFER_SHARDS)

    def _chosen(self, loader: Any, *, held_out: bool) -> Iterator[Rows]:
        import torch

        from .lenses.fitting import Rows

        reader = self.store.reader
        for batch in loader:
            docs = reader.documents_of(reader.token_column("seq", batch["row"].numpy()))
            kept = torch.from_numpy(is_held_out(docs, self.held_out_share, self.seed) == held_out)
            yield Rows(batch[self.site][kept].to(self.device), batch[self.final][kept].to(self.device))


def is_held_out(docs: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return which documents are held out: bool (document). By number and seed alone, so that no list is kept."""
    with np.errstate(over="ignore"):  # modulo 2⁶⁴ is meant: SplitMix64 (Steele, Lea, Flood 2014)
        mixed = (docs.astype(np.uint64) + np.uint64(seed) * np.uint64(0xD1B54A32D192ED03)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return np.asarray((mixed >> np.uint64(11)) / 2**53 < share)


def _write(
    store: Store, out: Path, sites: dict[int, Site], fits: dict[int, Fit], digest: str, settings: dict[str, Any]
) -> list[FittedSite]:
    """Write the folder: translators first, then a configuration that says what they were fitted to."""
    from .lenses.tuned import unembed_hash
    from .lenses.tuned_files import LensConfig, write_lens

    fitted = [
        FittedSite(str(sites[number]), number, fit.kl_logit_lens, fit.kl, fit.n_steps) for number, fit in fits.items()
    ]
    model = store.reader.store.model
    config = LensConfig(
        d_model=int(model["facts"]["d_model"]),
        n_layers=int(model["facts"]["n_layers"]),
        base_model=model["identity"]["name"],
        revision=model["identity"]["revision"],
        unembed_hash=unembed_hash(store.reader.kit_piece(digest)["weight"]),
        ours={"unembedding": digest, "sites": [asdict(one) for one in fitted], "settings": settings},
    )
    write_lens(out, config, {number: fit.translator for number, fit in fits.items()})
    return fitted
