"""Stored sites in the model's place: what a pass without the model reads, and which numbers it stands on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.models import Unembedding, unembedding_of
from actstore.recipe import Recipe, SourceIdentity
from actstore.sites import Site, not_stored, parse_site
from actstore.store import StoreReader
from actstore.tensors import as_tensor

from .directions import PROJECTED, WRITTEN_AS_THEY_ARE, Way
from .transfers import send

if TYPE_CHECKING:
    import torch

__all__ = ["StoredSites"]

UNEMBEDDING = "unembedding"


@dataclass(frozen=True)
class StoredSites:
    """The sites of one snapshot of a store, read onto a device."""

    reader: StoreReader
    device: torch.device

    def sites(self) -> list[Site]:
        """Return the stored sites in forward order, patterns apart: their columns depend on the store's windows."""
        return sorted((site for site in self._rows if site.kind != "pattern"), key=lambda site: site.depth)

    @cached_property
    def _rows(self) -> dict[Site, tuple[int, str]]:
        """Width and dtype of every stored site."""
        return {parse_site(row["site"]): (row["width"], row["dtype"]) for row in self.reader.sites}

    def site_width(self, site: Site) -> int:
        """Return the width of a site; raises UnknownName where it is not stored."""
        self.must_have(site)
        return self._rows[site][0]

    def must_have(self, site: Site) -> None:
        """Raise UnknownName, naming what is stored and how to add it, for a site that is not."""
        if site not in self._rows:
            raise not_stored(site, self.sites())

    def _owner(self, site: Site) -> str:
        return self.reader.layout.artifacts[f"sites/{site}"]

    def recipe_of(self, site: Site) -> Recipe:
        """Return the recipe by which a site was stored."""
        self.must_have(site)
        return Recipe.from_json(self.reader.passes[self._owner(site)].recipe)

    def sources(self, sites: Iterable[Site]) -> tuple[SourceIdentity, ...]:
        """Return what a pass over these sites stands on, in forward order."""
        ordered = sorted(set(sites), key=lambda site: site.depth)
        return tuple(
            SourceIdentity(site=str(site), dtype=self._rows[site][1], digest=self.recipe_of(site).digest)
            for site in ordered
        )

    def is_exact(self, site: Site) -> bool:
        """Return whether a site is stored without rounding: in the dtype that it was computed in, or a wider one."""
        return self._rows[site][1] in ("float32", self.recipe_of(site).compute_dtype)

    def done(self, sites: Iterable[Site]) -> list[int]:
        """Return the shards of which all these sites are stored, in order."""
        shards = [set(self.reader.done(f"sites/{site}")) for site in sites]
        return sorted(set.intersection(*shards)) if shards else []

    def shard(self, site: Site, shard: int) -> torch.Tensor:
        """Return a whole shard of a site in its stored dtype: (row, width), NaN on filler, as extraction has it."""
        import torch

        used = send(self.reader.matrix(f"sites/{site}", shard), self.device)
        whole = torch.full((self.reader.shard_rows, used.shape[1]), torch.nan, dtype=used.dtype, device=self.device)
        whole[: len(used)] = used
        return whole

    def gather(self, site: Site, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return these rows of a site in its stored dtype: (row, width)."""
        return as_tensor(self.reader.gather(f"sites/{site}", rows)).to(self.device)

    def kit(self, site: Site) -> dict[str, str]:
        """Return the kit pieces, with their digests, of what a site's numbers mean: unembedding, and the way to it."""
        pieces = self.reader.passes[self._owner(site)].kit
        return {name: pieces[name] for name in (UNEMBEDDING, f"output/{site}") if name in pieces}

    def unembedding_digest(self, site: Site) -> str:
        """Return the digest of the unembedding, in its own dtype, of the pass that stored a site."""
        return self.kit(site)[UNEMBEDDING]

    def unembedding_by(self, digest: str) -> Unembedding:
        """Return the unembedding with this digest on the device."""
        return unembedding_of(self.reader.kit_piece(digest), self.device)

    def way(self, site: Site) -> Way | None:
        """Return what lies between a site and the residual stream; None where nothing does, or the kit lacks it."""
        if site.kind in WRITTEN_AS_THEY_ARE:
            return Way()
        if site.kind not in PROJECTED or f"output/{site}" not in self.kit(site):
            return None
        piece = self.reader.kit_piece(self.kit(site)[f"output/{site}"])
        names = [name for name in ("weight", "bias", "gain") if name in piece]
        return Way(**{name: as_tensor(np.asarray(piece[name])).to(self.device) for name in names})
