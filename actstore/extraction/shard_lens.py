"""One shard of stored residual streams through a lens: what extraction's read-out makes of them, without the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from actstore.blocks import ShardBlock, TokenShard
from actstore.models import Unembedding
from actstore.recipe import Recipe
from actstore.sites import Site, parse_site

from .devices import is_out_of_memory, provenance, too_large
from .readout import as_matrices, read_out_shard
from .stored import StoredSites

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

    @property
    def doing(self) -> str:
        return "reading"

    @property
    def device_type(self) -> str:
        return self.stored.device.type

    def run(self, shard: TokenShard) -> ShardBlock:
        """Return the lens' read-outs of a shard.

        Raises InvalidInput where it does not fit the device's memory, CorruptStore where what is stored is damaged.
        """
        try:
            return self._run(shard)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            what = "The shard's rows and the logits of a block of them do not fit"
            raise too_large(what, error, "use a device with more memory") from error

    def _run(self, shard: TokenShard) -> ShardBlock:
        final = self.stored.shard(self.final, shard.shard)
        matrices: dict[str, npt.NDArray[Any]] = {}
        for first in range(0, len(self.recipe.lens_sites), SITES_AT_ONCE):
            names = self.recipe.lens_sites[first : first + SITES_AT_ONCE]
            sites = {name: self._translated(parse_site(name), shard.shard) for name in names}
            _, lenses = read_out_shard(self.unembedding, final, sites, shard, self.recipe.lens_k)
            for name, rows in lenses.items():
                matrices |= as_matrices(f"lens/{self.recipe.lens_name}/{name}", rows, len(shard.values))
        made = provenance(self.stored.device, compute_dtype=self.recipe.compute_dtype, tile_rows=self.recipe.tile_rows)
        return ShardBlock(shard.shard, shard.n_rows, matrices, {}, made)

    def _translated(self, site: Site, shard: int) -> torch.Tensor:
        rows = self.stored.shard(site, shard)
        return self.translators[site](rows) if site in self.translators else rows
