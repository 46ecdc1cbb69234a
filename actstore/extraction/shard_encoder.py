"""One shard of stored sites through coders: what extraction makes of them, without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from actstore.blocks import RowFirings, ShardBlock, TokenShard
from actstore.recipe import Recipe
from actstore.saes import Encoder
from actstore.sites import Site

from .devices import is_out_of_memory, provenance, too_large
from .stored import StoredSites
from .tiles import encode_shard, sites_of

if TYPE_CHECKING:
    import torch

__all__ = ["ShardEncoder"]


@dataclass(frozen=True)
class ShardEncoder:
    """Encodes shards of stored sites, for one recipe."""

    stored: StoredSites
    encoders: Sequence[Encoder]
    recipe: Recipe

    @property
    def doing(self) -> str:
        return "encoding"

    @property
    def device_type(self) -> str:
        return self.stored.device.type

    def run(self, shard: TokenShard) -> ShardBlock:
        """Return the firings and reconstructions of a shard.

        Raises InvalidInput where it does not fit the device's memory, CorruptStore where what is stored is damaged.
        """
        try:
            return self._run(shard)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            what = "The shard's rows and an SAE that reads them do not fit"
            raise too_large(what, error, "encode fewer SAEs at once, or on a device with more memory") from error

    def _run(self, shard: TokenShard) -> ShardBlock:
        matrices: dict[str, npt.NDArray[Any]] = {}
        firings: dict[str, RowFirings] = {}
        rows: dict[Site, torch.Tensor] = {}
        for encoder in sorted(self.encoders, key=lambda one: sites_of(one)[0].depth):
            wanted = sites_of(encoder)  # no others are kept: all together could be larger than the device
            rows = {site: rows[site] if site in rows else self.stored.shard(site, shard.shard) for site in wanted}
            sae = encoder.identity.sae
            firings[sae], matrices[f"reconstruction/{sae}"] = encode_shard(encoder, rows, shard, self.recipe)
        made = provenance(self.stored.device, compute_dtype=self.recipe.compute_dtype, tile_rows=self.recipe.tile_rows)
        return ShardBlock(shard.shard, shard.n_rows, matrices, firings, made)
