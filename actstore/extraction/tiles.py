"""Coders over the rows of one shard, in the recipe's tiles: the same bits wherever the rows come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.blocks import FLAG_SPECIAL, RowFirings, ShardBlock, TokenShard
from actstore.recipe import Recipe
from actstore.saes import EncodedTile, Encoder, round_mantissa
from actstore.sites import Site, parse_site

from .fetching import Coming, fetch

if TYPE_CHECKING:
    import torch

__all__ = [
    "Encoding",
    "encoded_in_slots",
    "finished_block",
    "largest_tile",
    "sites_of",
    "start_encoding",
    "with_filler",
]

TILE_ROWS = 1024
SLOTS_PER_ROW = 512  # a CUDA tile's room for firings; few coders have more, and those lose only time

Encoding = Callable[[], tuple[RowFirings, npt.NDArray[np.float32]]]
"""Waits for a shard's firings and RECONSTRUCTION_VALUES."""


def largest_tile(shard_rows: int) -> int:
    """Return the largest number of rows up to 1,024 that divides a shard: tiles are then all alike."""
    return next(size for size in range(min(TILE_ROWS, shard_rows), 0, -1) if shard_rows % size == 0)


def sites_of(encoder: Encoder) -> tuple[Site, ...]:
    """Return the site that an encoder reads and, of a transcoder, the one that it writes."""
    written = encoder.identity.write_site
    return (parse_site(encoder.identity.site), *((parse_site(written),) if written else ()))


def start_encoding(encoder: Encoder, rows: Mapping[Site, torch.Tensor], shard: TokenShard, recipe: Recipe) -> Encoding:
    """Begin to encode a shard in tiles of `recipe.tile_rows`; tiles of nothing but filler are left out.

    rows: (row, width) of the encoder's sites over the whole shard, on its device, NaN on filler. What is returned may
    be called in another thread; it gives the firings and RECONSTRUCTION_VALUES: float32 (row, 3), NaN on filler.
    """
    import torch

    values, *targets = (rows[site] for site in sites_of(encoder))
    listed = shard.column("token_id") >= 0
    if not recipe.encode_special:
        listed = listed & (shard.column("flags") & FLAG_SPECIAL == 0)
    valid = torch.from_numpy(listed).to(values.device)
    cut = [
        [one[first : first + recipe.tile_rows] for one in (values, valid, *targets)]
        for first in range(0, shard.n_rows, recipe.tile_rows)
    ]
    tiles = encoded_in_slots(encoder, cut, SLOTS_PER_ROW) if values.is_cuda else [encoder.encode(*one) for one in cut]
    fields = ("counts", "features", "activations", "reconstruction")
    coming = [fetch(torch.cat([getattr(tile, name) for tile in tiles])) for name in fields]
    return partial(_finished, coming, shard, recipe.activation_bits)


def encoded_in_slots(encoder: Encoder, cut: Sequence[Sequence[torch.Tensor]], slots_per_row: int) -> list[EncodedTile]:
    """Encode tiles, each its rows, which of them are listed, and targets; the host waits once, with all under way.

    A tile of more firings than `slots_per_row` times its rows is encoded a second time: that changes no result.
    """
    import torch

    tiles = [encoder.encode(*one, n_slots=slots_per_row * len(one[0])) for one in cut]
    numbers = torch.stack([torch.stack([tile.n_found, tile.counts.sum()]) for tile in tiles]).tolist() if tiles else []
    return [
        tile.first(n_listed) if n_found <= len(tile.features) else encoder.encode(*one)
        for tile, one, (n_found, n_listed) in zip(tiles, cut, numbers, strict=True)
    ]


def _finished(coming: Sequence[Coming], shard: TokenShard, bits: int) -> tuple[RowFirings, npt.NDArray[np.float32]]:
    """Put encoded tiles together: CSR over the whole shard, and l0, norm, error_norm of every row."""
    shard_rows = len(shard.values)
    counts, features, activations, reconstruction = (one() for one in coming)
    indptr = np.zeros(shard_rows + 1, dtype=np.int64)
    np.cumsum(counts[: shard.n_rows], out=indptr[1 : shard.n_rows + 1])
    indptr[shard.n_rows + 1 :] = indptr[shard.n_rows]
    firings = RowFirings(indptr, features, round_mantissa(activations, bits))
    return firings, with_filler(reconstruction[: shard.n_rows], shard_rows, np.nan)


def finished_block(
    shard: TokenShard,
    coming: Mapping[str, Coming],
    encodings: Mapping[str, Encoding],
    provenance: Mapping[str, Any],
    matrices: Mapping[str, npt.NDArray[Any]] | None = None,
) -> ShardBlock:
    """Wait for everything that was begun of a shard; `matrices` are here already."""
    encoded = {sae: encoding() for sae, encoding in encodings.items()}
    made = {path: one() for path, one in coming.items()} | dict(matrices or {})
    made |= {f"reconstruction/{sae}": reconstruction for sae, (_, reconstruction) in encoded.items()}
    firings = {sae: one for sae, (one, _) in encoded.items()}
    return ShardBlock(shard.shard, shard.n_rows, made, firings, provenance)


def with_filler(values: npt.NDArray[Any], shard_rows: int, filler: float) -> npt.NDArray[Any]:
    """Return the rows in use followed by filler up to a whole shard: (shard_rows, column)."""
    whole = np.full((shard_rows, values.shape[1]), filler, dtype=values.dtype)
    whole[: len(values)] = values
    return whole
