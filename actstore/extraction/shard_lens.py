"""One shard of stored residual streams through a lens: what extraction's read-out makes of them, without the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from actstore.blocks import ShardBlock, TokenShard
from actstore.models import Unembedding
from actstore.recipe import Recipe
from actstore.sites import Site, parse_site

from .devices import is_out_of_memory, provenance, too_large
from .readout import coming_matrices, read_out_shard
from .stopwatch import Stopwatch
from .stored import StoredSites
from .tiles import finished_block
from .transfers import Coming

if TYPE_CHECKING:
    import torch

__all__ = ["ShardLens", "Translate"]

SITES_AT_ONCE = 8  # the final distribution is computed once for so many; all sites together could exceed the memory

Translate = Callable[["torch.Tensor"], "torch.Tensor"]
"""What a tuned lens does to rows of a site before they are read: (row, d_model) to float32 (row, d_model)."""


@dataclass(frozen=True)
class ShardLens:
    """Reads shards of stored residual streams, for one recipe; a site without a translator is read as it is."""

    stored: StoredSites
    recipe: Recipe
    final: Site  # the residual stream that the model's own distribution is computed from
    unembedding: Unembedding
    translators: Mapping[Site, Translate] = field(default_factory=dict)
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def doing(self) -> str:
        return "reading"

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def start(self, shard: TokenShard) -> Callable[[], ShardBlock]:
        """Begin the lens' read-outs of a shard; return what waits for them.

        Raises InvalidInput where it does not fit the device's memory, CorruptStore where what is stored is damaged.
        """
        try:
            return self._start(shard)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            what = "The shard's rows and the logits of a block of them do not fit"
            raise too_large(what, error, "use a device with more memory") from error

    def _start(self, shard: TokenShard) -> Callable[[], ShardBlock]:
        final = self._read(self.final, shard.shard)
        coming: dict[str, Coming] = {}
        for first in range(0, len(self.recipe.lens_sites), SITES_AT_ONCE):
            names = self.recipe.lens_sites[first : first + SITES_AT_ONCE]
            rows = {name: self._read(parse_site(name), shard.shard) for name in names}
            with self.watch.measuring("read-out", self.device):
                sites = {name: self._translated(parse_site(name), one) for name, one in rows.items()}
                _, lenses = read_out_shard(self.unembedding, final, sites, shard, self.recipe.lens_k)
            for name, one in lenses.items():
                coming |= coming_matrices(f"lens/{self.recipe.lens_name}/{name}", one, len(shard.values))
        made = provenance(self.stored.device, compute_dtype=self.recipe.compute_dtype, tile_rows=self.recipe.tile_rows)
        return partial(finished_block, shard, coming, {}, made)

    def _read(self, site: Site, shard: int) -> torch.Tensor:
        with self.watch.measuring("read", self.device):
            return self.stored.shard(site, shard)

    def _translated(self, site: Site, rows: torch.Tensor) -> torch.Tensor:
        return self.translators[site](rows) if site in self.translators else rows
