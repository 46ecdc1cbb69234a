"""One shard through the model: the loop that every extraction is. It fills blocks and knows no file.

A shard's residual streams stay on the device until all its batches have run; coders and lenses then read them in fixed
tiles and blocks of rows. So what they make depends on neither the batches nor memory, and `encode` can repeat it later.
The host waits for the device once for each site that SAEs read, and for each tile that a screen decides again; all else
comes to it beside the next shard's work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from actstore.blocks import ShardBlock, TokenShard, scales_path
from actstore.models import LoadedModel
from actstore.quantised import quantise
from actstore.recipe import QUANTISED, Recipe
from actstore.saes import Encoder
from actstore.sites import Site, parse_site

from .attention import AttentionKeeper, with_all_keys
from .batches import Batch, plan_batches
from .devices import is_out_of_memory, provenance, too_large
from .readout import coming_matrices, read_out_shard
from .specs import stored_width
from .stopwatch import Stopwatch
from .tiles import Encoding, finished_block, grouped, sites_of, start_encodings
from .transfers import Coming, fetch, send

if TYPE_CHECKING:
    import torch

__all__ = ["ShardRunner"]

LESS_MEMORY = "use a shorter --context, fewer SAEs a pass, a smaller --attention-top, --dtype bfloat16, or a larger GPU"


@dataclass
class ShardRunner:
    """Runs shards through one model, for one recipe.

    Each shard has its own buffers: whoever writes the shard before may still read that one's.
    """

    model: LoadedModel
    encoders: Sequence[Encoder]
    recipe: Recipe
    shard_rows: int
    batch_tokens: int
    watch: Stopwatch = field(default_factory=Stopwatch)
    _buffers: dict[Site, torch.Tensor] = field(default_factory=dict)
    _attention: AttentionKeeper | None = None  # of the shard that runs, where the recipe asks for attention

    @property
    def last_residual(self) -> Site:
        """The site whose lens is the model's own prediction."""
        return Site("resid_post", self.model.facts.n_layers - 1)

    def captured(self) -> tuple[Site, ...]:
        """Return every site that the recipe needs from the model, in forward order."""
        wanted = {parse_site(name) for name in (*self.recipe.sites, *self.recipe.lens_sites)}
        wanted |= {site for encoder in self.encoders for site in sites_of(encoder)}
        if self.reads_out:
            wanted.add(self.last_residual)
        if self.recipe.attention_top:
            wanted |= {site for site in self.model.sites() if site.kind == "pattern"}
        return tuple(sorted(wanted, key=lambda site: site.depth))

    @property
    def doing(self) -> str:
        """What a report calls the work."""
        return "extracting"

    @property
    def device(self) -> torch.device:
        """The device that the numbers come from."""
        return self.model.device

    @property
    def reads_out(self) -> bool:
        return self.recipe.predictions or bool(self.recipe.lens_sites)

    def start(self, shard: TokenShard) -> Callable[[], ShardBlock]:
        """Begin everything that the recipe makes of a shard; return what waits for it, in any thread.

        Raises InvalidInput where one sequence, or a tile of an SAE, does not fit the device's memory.
        """
        try:
            return self._start(shard)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            what = "The shard's rows and the SAEs or lenses that read them do not fit"
            raise too_large(what, error, LESS_MEMORY) from error

    def _start(self, shard: TokenShard) -> Callable[[], ShardBlock]:
        self._buffers.clear()
        self._attention = self._attention_keeper(shard)
        with self.watch.measuring("forward", self.device):
            splits = self.capture(shard, self.captured())
        coming = {path: one for name in self.recipe.sites for path, one in self._stored(parse_site(name)).items()}
        with self.watch.measuring("encode", self.device):
            firings: dict[str, Encoding] = {}
            for sites, encoders in grouped(self.encoders).items():
                rows = [self._buffers[site] for site in sites]
                firings |= start_encodings(encoders, rows, shard, self.recipe)
        with self.watch.measuring("read-out", self.device):
            coming |= self._read_out(shard) if self.reads_out else {}
        coming |= {} if self._attention is None else self._attention.coming()
        return partial(finished_block, shard, coming, firings, self._provenance(splits))

    def capture(self, shard: TokenShard, sites: Iterable[Site]) -> list[dict[str, int]]:
        """Run all batches of a shard and keep these sites in the buffers; return how batches were split for memory."""
        sites = tuple(sites)
        for site in sites:
            if site.kind != "pattern" or str(site) in self.recipe.sites:  # of others only the heaviest keys are kept
                self._buffer(site)[shard.n_rows :] = float("nan")  # filler must never look like data
        splits: list[dict[str, int]] = []
        for number, batch in enumerate(plan_batches(shard, self.batch_tokens)):
            self._run_batch(batch, sites, number, splits)
        return splits

    def rows(self, site: Site) -> torch.Tensor:
        """Return what the last `capture` kept of a site: (row, width) over the whole shard, on the device."""
        return self._buffers[site]

    def _attention_keeper(self, shard: TokenShard) -> AttentionKeeper | None:
        k = self.recipe.attention_top
        return AttentionKeeper(shard, k, self.model.device) if k else None

    def _buffer(self, site: Site) -> torch.Tensor:
        import torch

        if site not in self._buffers:
            shape = (self.shard_rows, stored_width(site, self.recipe, self.model.site_width))
            dtype = getattr(torch, self.model.dtype)
            self._buffers[site] = torch.empty(shape, dtype=dtype, device=self.model.device)
        return self._buffers[site]

    def _run_batch(self, batch: Batch, sites: tuple[Site, ...], number: int, splits: list[dict[str, int]]) -> None:
        """Run a batch; where it does not fit the memory, its halves: what was captured of it is written again."""
        import torch

        try:
            self._forward(batch, sites)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch.n_sequences == 1:
                what = f"One sequence of {batch.token_ids.shape[1]} tokens does not fit"
                raise too_large(what, error, LESS_MEMORY) from error
        else:
            return
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        splits.append({"batch": number, "n_sequences": batch.n_sequences})
        for half in batch.halves():
            self._run_batch(half, sites, number, splits)

    def _forward(self, batch: Batch, sites: tuple[Site, ...]) -> None:
        device = self.model.device
        mask, rows = send(batch.attention_mask, device), send(batch.rows, device)
        real = send(np.flatnonzero(batch.attention_mask), device)  # asking the device would wait for it
        attention = None if self._attention is None else self._attention.of_batch(batch)

        def deposit(site: Site, values: torch.Tensor) -> None:
            if site.kind == "pattern":
                if attention is not None and site.layer is not None:
                    attention.keep(site.layer, values)
                if site not in self._buffers:
                    return
                values = with_all_keys(values, self.recipe.corpus.context)
            self._buffers[site].index_copy_(0, rows, values.reshape(-1, values.shape[-1]).index_select(0, real))

        self.model.capture(send(batch.token_ids, device), mask, sites, deposit)

    def _stored(self, site: Site) -> dict[str, Coming]:
        """Return a site's matrices by their paths: its rows in the storage dtype, and their scales where it has any."""
        import torch

        path = f"sites/{site}"
        if self.recipe.storage_dtype == QUANTISED:
            values, scales = quantise(self._buffers[site])
            return {path: fetch(values), scales_path(path): fetch(scales)}
        return {path: fetch(self._buffers[site].to(getattr(torch, self.recipe.storage_dtype)))}

    def _read_out(self, shard: TokenShard) -> dict[str, Coming]:
        sites = {name: self._buffers[parse_site(name)] for name in self.recipe.lens_sites}
        final, unembedding = self._buffers[self.last_residual], self.model.unembedding()
        predictions, lenses = read_out_shard(unembedding, final, sites, shard, self.recipe.lens_k)
        made = coming_matrices("predictions", predictions, self.shard_rows) if self.recipe.predictions else {}
        for site, rows in lenses.items():
            made |= coming_matrices(f"lens/{self.recipe.lens_name}/{site}", rows, self.shard_rows)
        return made

    def _provenance(self, splits: list[dict[str, int]]) -> dict[str, Any]:
        import transformers

        common = provenance(self.model.device, compute_dtype=self.model.dtype, tile_rows=self.recipe.tile_rows)
        return {
            **common,
            "device_map": self.model.spread,
            "batch_tokens": self.batch_tokens,
            "versions": {**common["versions"], "transformers": transformers.__version__},
            "memory_splits": splits,
        }
