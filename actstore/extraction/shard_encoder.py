"""One shard of stored sites through coders: what extraction makes of them, without the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from actstore.blocks import ShardBlock, TokenShard
from actstore.recipe import Recipe
from actstore.saes import Encoder
from actstore.sites import Site

from .devices import is_out_of_memory, provenance, too_large
from .stopwatch import Stopwatch
from .stored import StoredSites
from .tiles import Encoding, finished_block, grouped, start_encodings

if TYPE_CHECKING:
    import torch

__all__ = ["ShardEncoder"]


@dataclass(frozen=True)
class ShardEncoder:
    """Encodes shards of stored sites, for one recipe."""

    stored: StoredSites
    encoders: Sequence[Encoder]
    recipe: Recipe
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def doing(self) -> str:
        return "encoding"

    @property
    def device(self) -> torch.device:
        return self.stored.device

    def start(self, shard: TokenShard) -> Callable[[], ShardBlock]:
        """Begin the firings and reconstructions of a shard; return what waits for them.

        Raises InvalidInput where it does not fit the device's memory, CorruptStore where what is stored is damaged.
        """
        try:
            return self._start(shard)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            what = "The shard's rows and an SAE that reads them do not fit"
            raise too_large(what, error, "encode fewer SAEs at once, or on a device with more memory") from error

    def _start(self, shard: TokenShard) -> Callable[[], ShardBlock]:
        encodings: dict[str, Encoding] = {}
        rows: dict[Site, torch.Tensor] = {}
        for sites, encoders in grouped(self.encoders).items():
            with self.watch.measuring("read", self.device):  # no others are kept: all could be larger than the device
                rows = {site: rows[site] if site in rows else self.stored.shard(site, shard.shard) for site in sites}
            with self.watch.measuring("encode", self.device):
                encodings |= start_encodings(encoders, [rows[site] for site in sites], shard, self.recipe)
        made = provenance(self.stored.device, compute_dtype=self.recipe.compute_dtype, tile_rows=self.recipe.tile_rows)
        return partial(finished_block, shard, {}, encodings, made)
