"""Predictions and lenses on the device: from residual rows to a few numbers a row, in row blocks.

No more than a block of logits exists at a time: a whole batch of them would be larger than the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from actstore.blocks import TokenShard
from actstore.models import Unembedding, logits

from .tiles import with_filler
from .transfers import Coming, fetch, send

if TYPE_CHECKING:
    import torch

__all__ = ["LensRows", "PredictionRows", "coming_matrices", "read_out", "read_out_shard", "targets_of"]

# A function of the vocabulary alone, never of free memory, so that results are not either. A small vocabulary's block
# stays in the processor's cache; a large one's has rows enough that reading the unembedding does not dominate.
LOGITS_PER_BLOCK = 1 << 20
ROWS_AT_LEAST = 512


@dataclass(frozen=True)
class PredictionRows:
    """The model's own next-token result.

    values float32 (row, 3): PREDICTION_VALUES; ids int32 (row, 2): PREDICTION_IDS.
    """

    values: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True)
class LensRows:
    """A lens at one site.

    values float32 (row, 3 + k): LENS_VALUES, then log-probabilities; ids int32 (row, 1 + k): LENS_IDS, then tokens.
    """

    values: torch.Tensor
    ids: torch.Tensor


def targets_of(token_id: npt.NDArray[np.int64], seq: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return each row's next token in its sequence, −1 on the last one: int64 (row)."""
    targets = np.full_like(token_id, -1)
    same = seq[1:] == seq[:-1]
    targets[:-1][same] = token_id[1:][same]
    return targets


def read_out_shard(
    unembedding: Unembedding, final: torch.Tensor, sites: Mapping[str, torch.Tensor], shard: TokenShard, k: int
) -> tuple[PredictionRows, dict[str, LensRows]]:
    """Return `read_out` of a shard's rows in use; final and sites: (row, d_model) over the whole shard."""
    n_rows = shard.n_rows
    token_id, seq = (shard.column(name)[:n_rows].astype(np.int64) for name in ("token_id", "seq"))
    targets = send(targets_of(token_id, seq), final.device)
    return read_out(unembedding, final[:n_rows], {site: rows[:n_rows] for site, rows in sites.items()}, targets, k)


def coming_matrices(path: str, rows: PredictionRows | LensRows, shard_rows: int) -> dict[str, Coming]:
    """Return a read-out as the matrices `path`/values and `path`/ids of a whole shard, filler included."""
    return {
        f"{path}/values": _whole(fetch(rows.values), shard_rows, np.nan),
        f"{path}/ids": _whole(fetch(rows.ids), shard_rows, -1),
    }


def _whole(coming: Coming, shard_rows: int, filler: float) -> Coming:
    return lambda: with_filler(coming(), shard_rows, filler)


def read_out(
    unembedding: Unembedding,
    final: torch.Tensor,
    sites: Mapping[str, torch.Tensor],
    targets: torch.Tensor,
    k: int,
) -> tuple[PredictionRows, dict[str, LensRows]]:
    """Return predictions from the last residual stream and the logit lens of every site.

    final and sites: (row, d_model) of any float dtype; targets int64 (row), −1 for none. The lens of a site is
    logits(final_norm(x)) with the model's own soft cap (nostalgebraist 2020). KL is
    KL(final ‖ lens); it and the entropy are in nats.
    """
    import torch

    predictions: list[PredictionRows] = []
    lenses: dict[str, list[LensRows]] = {site: [] for site in sites}
    for block in _blocks(len(final), unembedding.weight.shape[0]):
        final_logprobs = torch.log_softmax(logits(unembedding, final[block]), dim=-1)
        final_probabilities = final_logprobs.exp()
        predictions.append(_predict(final_logprobs, final_probabilities, targets[block]))
        for site, rows in sites.items():
            logprobs = torch.log_softmax(logits(unembedding, rows[block]), dim=-1)
            divergence = (final_probabilities * (final_logprobs - logprobs)).sum(-1)
            lenses[site].append(_lens(logprobs, divergence, targets[block], k))
    joined = {site: LensRows(*_joined(parts)) for site, parts in lenses.items()}
    return PredictionRows(*_joined(predictions)), joined


def _blocks(n_rows: int, vocabulary_size: int) -> Iterator[slice]:
    size = max(ROWS_AT_LEAST, LOGITS_PER_BLOCK // vocabulary_size)
    return (slice(first, min(first + size, n_rows)) for first in range(0, n_rows, size))


def _joined(parts: list[PredictionRows] | list[LensRows]) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    return torch.cat([part.values for part in parts]), torch.cat([part.ids for part in parts])


def _target_logprob(logprobs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    chosen = logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return chosen.masked_fill(targets < 0, float("nan"))


def _predict(logprobs: torch.Tensor, probabilities: torch.Tensor, targets: torch.Tensor) -> PredictionRows:
    import torch

    top, top_id = logprobs.max(-1)
    entropy = -(probabilities * logprobs).sum(-1)
    values = torch.stack([_target_logprob(logprobs, targets), entropy, top.exp()], dim=1)
    return PredictionRows(values, torch.stack([targets, top_id.masked_fill(top.isnan(), -1)], dim=1).int())


def _lens(logprobs: torch.Tensor, divergence: torch.Tensor, targets: torch.Tensor, k: int) -> LensRows:
    """Rank 1 is the likeliest token; −1 where there is no target."""
    import torch

    target = _target_logprob(logprobs, targets)
    rank = (logprobs > target[:, None]).sum(-1, dtype=torch.int32) + 1
    rank = rank.masked_fill(target.isnan(), -1)  # no target, or logits that are not numbers
    top, top_id = logprobs.topk(k, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    values = torch.cat([torch.stack([target, entropy, divergence], dim=1), top], dim=1)
    return LensRows(values, torch.cat([rank[:, None], top_id], dim=1).int())
