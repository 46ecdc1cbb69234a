"""One shard through the model: the loop that every extraction is. It fills blocks and knows no file.

A shard's residual streams stay on the device until all its batches have run; coders and lenses then read them in fixed
tiles and blocks of rows. So what they make depends on neither the batches nor memory, and `encode` can repeat it later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from actstore.blocks import RowFirings, ShardBlock, TokenShard
from actstore.errors import InvalidInput, explain
from actstore.models import LoadedModel
from actstore.recipe import Recipe
from actstore.saes import Encoder, round_mantissa
from actstore.sites import Site, parse_site

from .attention import AttentionKeeper, with_all_keys
from .batches import Batch, plan_batches
from .readout import read_out, targets_of
from .specs import stored_width

if TYPE_CHECKING:
    import torch

__all__ = ["ShardRunner"]


@dataclass
class ShardRunner:
    """Runs shards through one model, for one recipe; its buffers are made once and reused."""

    model: LoadedModel
    encoders: Sequence[Encoder]
    recipe: Recipe
    shard_rows: int
    batch_tokens: int
    _buffers: dict[Site, torch.Tensor] = field(default_factory=dict)
    _attention: AttentionKeeper | None = None  # of the shard that runs, where the recipe asks for attention

    @property
    def last_residual(self) -> Site:
        """The site whose lens is the model's own prediction."""
        return Site("resid_post", self.model.facts.n_layers - 1)

    def captured(self) -> tuple[Site, ...]:
        """Return every site that the recipe needs from the model, in forward order."""
        wanted = {parse_site(name) for name in (*self.recipe.sites, *self.recipe.lens_sites)}
        wanted |= {site for encoder in self.encoders for site in _sites_of(encoder)}
        if self.reads_out:
            wanted.add(self.last_residual)
        if self.recipe.attention_top:
            wanted |= {site for site in self.model.sites() if site.kind == "pattern"}
        return tuple(sorted(wanted, key=lambda site: site.depth))

    @property
    def reads_out(self) -> bool:
        return self.recipe.predictions or bool(self.recipe.lens_sites)

    def run(self, shard: TokenShard) -> ShardBlock:
        """Return everything that the recipe makes of a shard.

        Raises InvalidInput where one sequence, or a tile of an SAE, does not fit the device's memory.
        """
        try:
            return self._run(shard)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise _too_large("The shard's rows and the SAEs or lenses that read them do not fit", error) from error

    def _run(self, shard: TokenShard) -> ShardBlock:
        self._attention = AttentionKeeper(shard, self.recipe.attention_top) if self.recipe.attention_top else None
        splits = self.capture(shard, self.captured())
        matrices = {f"sites/{name}": self._stored(parse_site(name)) for name in self.recipe.sites}
        firings = {}
        for encoder in self.encoders:
            sae = encoder.identity.sae
            firings[sae], matrices[f"reconstruction/{sae}"] = self._encode(encoder, shard)
        if self.reads_out:
            matrices |= self._read_out(shard)
        if self._attention is not None:
            matrices |= self._attention.matrices()
        return ShardBlock(shard.shard, shard.n_rows, matrices, firings, self._provenance(splits))

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
            if not _is_out_of_memory(error):
                raise
            if batch.n_sequences == 1:
                raise _too_large(f"One sequence of {batch.token_ids.shape[1]} tokens does not fit", error) from error
        else:
            return
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        splits.append({"batch": number, "n_sequences": batch.n_sequences})
        for half in batch.halves():
            self._run_batch(half, sites, number, splits)

    def _forward(self, batch: Batch, sites: tuple[Site, ...]) -> None:
        import torch

        device = self.model.device
        mask = torch.from_numpy(batch.attention_mask).to(device)
        rows = torch.from_numpy(batch.rows).to(device)
        real = mask.reshape(-1).nonzero()[:, 0]
        attention = None if self._attention is None else self._attention.of_batch(batch, device)

        def deposit(site: Site, values: torch.Tensor) -> None:
            if site.kind == "pattern":
                if attention is not None and site.layer is not None:
                    attention.keep(site.layer, values)
                if site not in self._buffers:
                    return
                values = with_all_keys(values, self.recipe.corpus.context)
            self._buffers[site].index_copy_(0, rows, values.reshape(-1, values.shape[-1]).index_select(0, real))

        self.model.capture(torch.from_numpy(batch.token_ids).to(device), mask, sites, deposit)

    def _stored(self, site: Site) -> npt.NDArray[Any]:
        import torch

        values = self._buffers[site].to(getattr(torch, self.recipe.storage_dtype)).cpu()
        if values.dtype == torch.bfloat16:
            return values.view(torch.uint16).numpy().copy().view(ml_dtypes.bfloat16)
        return values.numpy().copy()  # the buffer is reused by the next shard

    def _encode(self, encoder: Encoder, shard: TokenShard) -> tuple[RowFirings, npt.NDArray[np.float32]]:
        """Encode a shard in tiles of `recipe.tile_rows`; tiles of nothing but filler are left out."""
        import torch

        values, *targets = (self._buffers[site] for site in _sites_of(encoder))
        listed = shard.column("token_id") >= 0
        if not self.recipe.encode_special:
            listed = listed & (shard.column("flags") & 1 == 0)
        valid = torch.from_numpy(listed).to(values.device)
        tiles = [
            encoder.encode(*(rows[first : first + self.recipe.tile_rows] for rows in (values, valid, *targets)))
            for first in range(0, shard.n_rows, self.recipe.tile_rows)
        ]
        return _joined(tiles, shard, self.shard_rows, self.recipe.activation_bits)

    def _read_out(self, shard: TokenShard) -> dict[str, npt.NDArray[Any]]:
        import torch

        n_rows, device = shard.n_rows, self.model.device
        token_id, seq = (torch.from_numpy(shard.column(name)[:n_rows].astype(np.int64)) for name in ("token_id", "seq"))
        sites = {name: self._buffers[parse_site(name)][:n_rows] for name in self.recipe.lens_sites}
        final = self._buffers[self.last_residual][:n_rows]
        predictions, lenses = read_out(
            self.model.unembedding(), final, sites, targets_of(token_id, seq).to(device), self.recipe.lens_k
        )
        made: dict[str, npt.NDArray[Any]] = {}
        if self.recipe.predictions:
            made |= self._filled("predictions", predictions.values, predictions.ids)
        for site, rows in lenses.items():
            made |= self._filled(f"lens/logit/{site}", rows.values, rows.ids)
        return made

    def _filled(self, path: str, values: torch.Tensor, ids: torch.Tensor) -> dict[str, npt.NDArray[Any]]:
        return {
            f"{path}/values": _with_filler(values.cpu().numpy(), self.shard_rows, np.nan),
            f"{path}/ids": _with_filler(ids.cpu().numpy(), self.shard_rows, -1),
        }

    def _provenance(self, splits: list[dict[str, int]]) -> dict[str, Any]:
        import torch
        import transformers

        return {
            "device_type": self.model.device.type,
            "device": _device_name(self.model.device),
            "device_map": self.model.spread,
            "compute_dtype": self.model.dtype,
            "tf32": False,
            "threads": torch.get_num_threads(),  # of the CPU: sums are split among them
            "batch_tokens": self.batch_tokens,
            "tile_rows": self.recipe.tile_rows,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "memory_splits": splits,
        }


def _sites_of(encoder: Encoder) -> tuple[Site, ...]:
    """Return the site that an encoder reads and, of a transcoder, the one that it writes."""
    written = encoder.identity.write_site
    return (parse_site(encoder.identity.site), *((parse_site(written),) if written else ()))


def _joined(
    tiles: Sequence[Any], shard: TokenShard, shard_rows: int, bits: int
) -> tuple[RowFirings, npt.NDArray[np.float32]]:
    """Put encoded tiles together: CSR over the whole shard, and l0, norm, error_norm of every row."""
    counts = np.concatenate([tile.counts.cpu().numpy() for tile in tiles])[: shard.n_rows]
    indptr = np.zeros(shard_rows + 1, dtype=np.int64)
    np.cumsum(counts, out=indptr[1 : len(counts) + 1])
    indptr[len(counts) + 1 :] = indptr[len(counts)]
    features = np.concatenate([tile.features.cpu().numpy() for tile in tiles])
    activations = np.concatenate([tile.activations.cpu().numpy() for tile in tiles])
    reconstruction = np.concatenate([tile.reconstruction.cpu().numpy() for tile in tiles])[: shard.n_rows]
    firings = RowFirings(indptr, features, round_mantissa(activations, bits))
    return firings, _with_filler(reconstruction, shard_rows, np.nan)


def _with_filler(values: npt.NDArray[Any], shard_rows: int, filler: float) -> npt.NDArray[Any]:
    whole = np.full((shard_rows, values.shape[1]), filler, dtype=values.dtype)
    whole[: len(values)] = values
    return whole


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it; the CPU's allocator only a sentence."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _too_large(what: str, error: RuntimeError) -> InvalidInput:
    return InvalidInput(
        explain(
            f"{what} the memory ({str(error).splitlines()[0]})",
            next_step="use a shorter --context, fewer SAEs a pass, --dtype bfloat16, or a device with more memory",
        )
    )


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
