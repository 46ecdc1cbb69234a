"""Coders over the rows of one shard, in the recipe's tiles: the same bits wherever the rows come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.blocks import FLAG_SPECIAL, RowFirings, ShardBlock, TokenShard
from actstore.recipe import Recipe
from actstore.saes import EncodedTile, Encoder, TileRows, round_mantissa
from actstore.sites import Site, parse_site

from .transfers import Coming, fetch, send

if TYPE_CHECKING:
    import torch

__all__ = [
    "Encoding",
    "encoded_tiles",
    "finished_block",
    "grouped",
    "largest_tile",
    "sites_of",
    "start_encodings",
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


def grouped(encoders: Iterable[Encoder]) -> dict[tuple[Site, ...], list[Encoder]]:
    """Return the encoders by their sites, in forward order of what they read."""
    together: dict[tuple[Site, ...], list[Encoder]] = {}
    for encoder in sorted(encoders, key=lambda one: sites_of(one)[0].depth):
        together.setdefault(sites_of(encoder), []).append(encoder)
    return together


def start_encodings(
    encoders: Sequence[Encoder], sites: Sequence[torch.Tensor], shard: TokenShard, recipe: Recipe
) -> dict[str, Encoding]:
    """Begin to encode a shard, by coder, in tiles of `recipe.tile_rows`; tiles of nothing but filler are left out.

    The encoders have the same sites: (row, width) over the whole shard, on their device, NaN on filler. What is
    returned may be called in another thread; it gives the firings and RECONSTRUCTION_VALUES: float32 (row, 3), NaN on
    filler.
    """
    import torch

    device, size = sites[0].device, recipe.tile_rows
    listed = shard.column("token_id") >= 0
    if not recipe.encode_special:
        listed = listed & (shard.column("flags") & FLAG_SPECIAL == 0)
    rows, *targets = sites
    whole = rows, send(listed, device), *targets
    cut = [[one[first : first + size] for one in whole] for first in range(0, shard.n_rows, size)]
    encoded = encoded_tiles(encoders, cut, SLOTS_PER_ROW if device.type == "cuda" else None)
    fields = ("counts", "features", "activations", "reconstruction")
    started: dict[str, Encoding] = {}
    for encoder, tiles in zip(encoders, encoded, strict=True):
        coming = [fetch(torch.cat([getattr(tile, name) for tile in tiles])) for name in fields]
        started[encoder.identity.sae] = partial(_finished, coming, shard, recipe.activation_bits)
    return started


def encoded_tiles(
    encoders: Sequence[Encoder], cut: Sequence[Sequence[torch.Tensor]], slots_per_row: int | None = None
) -> list[list[EncodedTile]]:
    """Encode tiles, each its rows, which of them are listed, and targets, with every encoder: (encoder, tile).

    With `slots_per_row` a tile has room for so many firings times its rows, and the host waits once, with all under
    way; what has more is encoded a second time: that changes no result.
    """
    made = [_by_every(encoders, one, slots_per_row) for one in cut]
    by_encoder = [list(tiles) for tiles in zip(*made, strict=True)]
    if slots_per_row is None:
        return by_encoder
    return [
        [
            tile.first(n_listed) if n_found <= len(tile.features) else encoder.encode(*one)
            for tile, one, (n_found, n_listed) in zip(tiles, cut, numbers, strict=True)
        ]
        for encoder, tiles, numbers in zip(encoders, by_encoder, _numbers(by_encoder), strict=True)
    ]


def _by_every(encoders: Sequence[Encoder], one: Sequence[torch.Tensor], slots_per_row: int | None) -> list[EncodedTile]:
    values, listed, *others = one
    rows, targets = TileRows.of(values), [TileRows.of(other) for other in others]
    n_slots = None if slots_per_row is None else slots_per_row * len(listed)
    return [encoder.encode(rows, listed, *targets, n_slots=n_slots) for encoder in encoders]


def _numbers(tiles: Sequence[Sequence[EncodedTile]]) -> list[list[list[int]]]:
    """Wait for the device; return of every tile how many firings were found and how many are listed."""
    import torch

    pairs = [torch.stack([torch.stack([tile.n_found, tile.counts.sum()]) for tile in of_one]) for of_one in tiles]
    found: list[list[list[int]]] = torch.stack(pairs).tolist()
    return found


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
    shard: TokenShard, coming: Mapping[str, Coming], encodings: Mapping[str, Encoding], provenance: Mapping[str, Any]
) -> ShardBlock:
    """Wait for everything that was begun of a shard."""
    encoded = {sae: encoding() for sae, encoding in encodings.items()}
    made = {path: one() for path, one in coming.items()}
    made |= {f"reconstruction/{sae}": reconstruction for sae, (_, reconstruction) in encoded.items()}
    firings = {sae: one for sae, (one, _) in encoded.items()}
    return ShardBlock(shard.shard, shard.n_rows, made, firings, provenance)


def with_filler(values: npt.NDArray[Any], shard_rows: int, filler: float) -> npt.NDArray[Any]:
    """Return the rows in use followed by filler up to a whole shard: (shard_rows, column)."""
    whole = np.full((shard_rows, values.shape[1]), filler, dtype=values.dtype)
    whole[: len(values)] = values
    return whole
