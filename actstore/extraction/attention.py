"""What is kept of attention: the heaviest keys of every layer, head and row, reduced on the device layer by layer.

A pattern is as large as all its keys, so none outlives its layer and its batch; what is left of a row is a few numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from actstore.blocks import ATTENTION_VALUES, FLAG_SPECIAL, TokenShard

from .batches import Batch
from .transfers import Coming, fetch, send

if TYPE_CHECKING:
    import torch

__all__ = ["AttentionKeeper", "with_all_keys"]

# Weights that are reduced at once: a function of the batch and the type of device, never of free memory, so that
# results are not either. CUDA's kernels have to last longer than their launch; all that is made of a block is 1 GB.
WEIGHTS_PER_BLOCK, WEIGHTS_PER_CUDA_BLOCK = 1 << 22, 1 << 25
KEY_BITS = {"bfloat16": 16, "float32": 29}  # of a fraction that these leave free in a float32, and in a float64


def with_all_keys(pattern: torch.Tensor, context: int) -> torch.Tensor:
    """Return (batch, head, query, key) as rows of the site `pattern`: (batch, query, head · context).

    The columns of a head are the keys 0 … context − 1 of the row's own sequence; weights on keys that are not in the
    batch are 0.
    """
    from torch.nn.functional import pad

    return pad(pattern, (0, context - pattern.shape[-1])).transpose(1, 2).flatten(2)


@dataclass(frozen=True, eq=False)
class _Kept:
    """One layer's numbers over a whole shard, filler included, on the device.

    weights float32 (row, head, k), heaviest first; offsets int32 alike; values float32 (row, head, ATTENTION_VALUES).
    """

    weights: torch.Tensor
    offsets: torch.Tensor
    values: torch.Tensor

    @classmethod
    def empty(cls, n_rows: int, n_heads: int, k: int, device: torch.device) -> _Kept:
        import torch

        return cls(
            torch.full((n_rows, n_heads, k), torch.nan, device=device),
            torch.full((n_rows, n_heads, k), -1, dtype=torch.int32, device=device),
            torch.full((n_rows, n_heads, len(ATTENTION_VALUES)), torch.nan, device=device),
        )


@dataclass
class AttentionKeeper:
    """Keeps the `k` heaviest keys of every layer, head and row of one shard."""

    shard: TokenShard
    k: int
    device: torch.device
    _layers: dict[int, _Kept] = field(default_factory=dict)

    def of_batch(self, batch: Batch) -> AttentionBatch:
        """Return what keeps the patterns of one batch."""
        flags = np.zeros(batch.token_ids.shape, dtype=np.int32)
        flags[batch.attention_mask.astype(bool)] = self.shard.column("flags")[batch.rows]
        special = send((flags & FLAG_SPECIAL) != 0, self.device)
        rows, token_ids = send(batch.rows, self.device), send(batch.token_ids, self.device)
        places = send(np.argwhere(batch.attention_mask), self.device)
        return AttentionBatch(self, rows, places, _after_the_same(token_ids, special))

    def layer(self, layer: int, n_heads: int) -> _Kept:
        """Return what is kept of a layer, made where it is met first."""
        if layer not in self._layers:
            self._layers[layer] = _Kept.empty(len(self.shard.values), n_heads, self.k, self.device)
        return self._layers[layer]

    def coming(self) -> dict[str, Coming]:
        """Return the arrays of every layer, on their way to the host, by their paths."""
        return {
            f"attention/{layer}/{name}": fetch(getattr(kept, name))
            for layer, kept in self._layers.items()
            for name in ("weights", "offsets", "values")
        }


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """The rows of one batch.

    rows int64 (token): as in `Batch`; places int64 (token, 2): sequence and position of each; after_the_same bool
    (sequence, query, key).
    """

    keeper: AttentionKeeper
    rows: torch.Tensor
    places: torch.Tensor
    after_the_same: torch.Tensor

    def keep(self, layer: int, pattern: torch.Tensor) -> None:
        """Reduce the pattern of one layer: (sequence, head, query, key) in the compute dtype."""
        kept = self.keeper.layer(layer, pattern.shape[1])
        for first, places in self._blocks(pattern):
            sequence, position = places.T
            computed = pattern[sequence, :, position]
            rows = self.rows[first : first + len(places)]
            heaviest, keys = _heaviest(computed, self.keeper.k)
            weights = computed.float()
            values = _values(weights, heaviest, position, self.after_the_same[sequence, position])
            kept.weights.index_copy_(0, rows, heaviest)
            kept.offsets.index_copy_(0, rows, _offsets(position, keys))
            kept.values.index_copy_(0, rows, values)

    def _blocks(self, pattern: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        n_weights = WEIGHTS_PER_CUDA_BLOCK if pattern.is_cuda else WEIGHTS_PER_BLOCK
        size = max(1, n_weights // (pattern.shape[1] * pattern.shape[3]))
        return ((first, self.places[first : first + size]) for first in range(0, len(self.places), size))


def _after_the_same(token_ids: torch.Tensor, special: torch.Tensor) -> torch.Tensor:
    """Return which keys directly follow an earlier occurrence of each query's token: bool (sequence, query, key).

    A key that is the query itself is not among them, and special tokens match nothing.
    """
    import torch

    same = torch.zeros((*token_ids.shape, token_ids.shape[1]), dtype=torch.bool, device=token_ids.device)
    same[:, :, 1:] = token_ids[:, :, None] == token_ids[:, None, :-1]
    same &= ~special[:, :, None]
    return same.tril_(-1)


def _heaviest(weights: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k heaviest weights of each (row, head), float32, NaN where there are fewer; and their keys, −1 there.

    Heaviest first, ties to the lower key; weights of 0 are none. The keys, counted from the last, go into the bits that
    weights leave free in a number of twice their size, read as an integer: so no two are equal, and their order is that
    of weights, which are not negative, then of keys.
    """
    import torch

    n_keys = weights.shape[-1]
    is_narrow = weights.dtype == torch.bfloat16 and n_keys <= 1 << KEY_BITS["bfloat16"]
    wide, word, name = (
        (torch.float32, torch.int32, "bfloat16") if is_narrow else (torch.float64, torch.int64, "float32")
    )
    bits = weights.to(wide).view(word)  # a copy: it is wider
    bits |= torch.arange(n_keys - 1, -1, -1, dtype=word, device=weights.device)
    top = bits.topk(min(k, n_keys), dim=-1).values
    of_keys = (1 << KEY_BITS[name]) - 1
    heaviest = (top & ~of_keys).view(wide).float()
    none = ~(heaviest > 0)  # NaN is none
    keys = (n_keys - 1 - (top & of_keys)).masked_fill(none, -1)
    heaviest = heaviest.masked_fill(none, torch.nan)
    missing = (0, k - heaviest.shape[-1])
    pad = torch.nn.functional.pad
    return pad(heaviest, missing, value=torch.nan), pad(keys, missing, value=-1)


def _offsets(position: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (position[:, None, None] - keys).masked_fill(keys < 0, -1).int()


def _values(
    weights: torch.Tensor, heaviest: torch.Tensor, position: torch.Tensor, after_the_same: torch.Tensor
) -> torch.Tensor:
    """Return ATTENTION_VALUES of each (row, head): float32 (row, head, value); docs/format.md §5 defines them.

    weights (row, head, key); heaviest (row, head, k); position (row); after_the_same bool (row, key).
    """
    import torch

    first, unmatched = position == 0, ~after_the_same.any(-1)
    entropy = torch.special.entr(weights).sum(-1)
    fields = (
        heaviest.nansum(-1).masked_fill(entropy.isnan(), torch.nan),
        entropy,
        _at(weights, position - 1).masked_fill(first[:, None], torch.nan),
        _at(weights, position),
        weights[..., 0].masked_fill(first[:, None], torch.nan),
        (weights * after_the_same[:, None]).sum(-1).masked_fill(unmatched[:, None], torch.nan),
    )
    return torch.stack(fields, dim=-1)


def _at(weights: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Return the weight of one key of each row: (row, head)."""
    index = key.clamp(min=0)[:, None, None].expand(-1, weights.shape[1], 1)
    return weights.gather(-1, index)[..., 0]
