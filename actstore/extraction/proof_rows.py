"""The rows that SAEs are proved on: the first plain ones of a corpus, from the model or from what is stored of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.blocks import TokenShard, is_plain
from actstore.models import LoadedModel
from actstore.recipe import Recipe
from actstore.saes import ROWS_NEEDED
from actstore.sites import Site

from .batches import sequences_of
from .runner import ShardRunner
from .stored import StoredSites

if TYPE_CHECKING:
    import torch

__all__ = ["RowsOfModel", "RowsOfStore"]

PROOF_ROWS = 4096  # run for the proof where all are plain; it needs 1,024 plain ones
MOST_PIECES = 16  # of PROOF_ROWS rows each: overlapping windows have few plain rows


@dataclass(frozen=True)
class _Piece:
    """Whole sequences of a shard, and the number of their first row."""

    first: int
    tokens: TokenShard

    @property
    def plain(self) -> npt.NDArray[np.int64]:
        """Places of the plain rows in the piece: int64 (row)."""
        return np.flatnonzero(is_plain(self.tokens.column("flags"))).astype(np.int64)


@dataclass(frozen=True)
class RowsOfModel:
    """Rows that the model is run for; `shards` are the corpus from its beginning, filler left out."""

    model: LoadedModel
    recipe: Recipe
    shards: Iterable[TokenShard]
    batch_tokens: int

    @property
    def among(self) -> str:
        return "all sites"

    def sites(self) -> Sequence[Site]:
        return self.model.sites()

    def site_width(self, site: Site) -> int:
        return self.model.site_width(site)

    def at(self, sites: set[Site]) -> dict[Site, torch.Tensor]:
        import torch

        parts: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
        for piece in self._pieces:
            runner = ShardRunner(self.model, (), self.recipe, len(piece.tokens.values), self.batch_tokens)
            runner.capture(piece.tokens, sorted(sites, key=lambda site: site.depth))
            plain = torch.from_numpy(piece.plain).to(self.model.device)
            for site in sites:
                parts[site].append(runner.rows(site).index_select(0, plain))
        return {site: torch.cat(found) for site, found in parts.items()}

    @cached_property
    def _pieces(self) -> list[_Piece]:
        return _pieces(self.shards, self.recipe.corpus.shard_rows)


@dataclass(frozen=True)
class RowsOfStore:
    """Rows that are stored, of the shards that can be read."""

    stored: StoredSites
    shards: Sequence[int]

    @property
    def among(self) -> str:
        return "all stored sites"

    def sites(self) -> Sequence[Site]:
        """Return the stored sites that have the shards, all of them."""
        return [site for site in self.stored.sites() if set(self.shards) <= set(self.stored.done({site}))]

    def site_width(self, site: Site) -> int:
        return self.stored.site_width(site)

    def at(self, sites: set[Site]) -> dict[Site, torch.Tensor]:
        return {site: self.stored.gather(site, self._rows) for site in sites}

    @cached_property
    def _rows(self) -> npt.NDArray[np.int64]:
        tokens = (TokenShard(shard, self.stored.reader.tokens(shard)) for shard in self.shards)
        pieces = _pieces(tokens, self.stored.reader.shard_rows)
        return np.concatenate([piece.first + piece.plain for piece in pieces])


def _pieces(shards: Iterable[TokenShard], shard_rows: int) -> list[_Piece]:
    """Return the first whole sequences of the corpus, filler left out, in pieces of at most PROOF_ROWS rows.

    So many pieces that they have PROOF_ROWS rows and ROWS_NEEDED plain ones, but no more than MOST_PIECES.
    """
    pieces: list[_Piece] = []
    n_rows = n_plain = 0
    for piece in (piece for shard in shards for piece in _cut(shard, shard.shard * shard_rows)):
        pieces.append(piece)
        n_rows += len(piece.tokens.values)
        n_plain += len(piece.plain)
        if (n_rows >= PROOF_ROWS and n_plain >= ROWS_NEEDED) or len(pieces) == MOST_PIECES:
            break
    return pieces


def _cut(shard: TokenShard, first_row: int) -> Iterator[_Piece]:
    """Yield consecutive whole sequences of a shard, at most PROOF_ROWS rows of them but at least one sequence."""
    bounds = [0, *np.cumsum(sequences_of(shard).lengths).tolist()]
    first = 0
    for place in range(1, len(bounds)):
        is_last = place == len(bounds) - 1
        if is_last or bounds[place + 1] - bounds[first] > PROOF_ROWS:
            yield _Piece(
                first_row + bounds[first], TokenShard(shard.shard, shard.values[bounds[first] : bounds[place]])
            )
            first = place
