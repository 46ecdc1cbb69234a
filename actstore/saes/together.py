"""The proof of a coder of several layers: what all its layers up to one write there together is what is there.

Layer after layer from below: the features of a layer are made once, and added, through its decoders, to the sums of all
later layers. Decoders are read from the file one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actstore.health import HealthCheck

from .encoder import SaeEncoder
from .layers import LayerDecoders
from .proof import ROWS_NEEDED

if TYPE_CHECKING:
    import torch

__all__ = ["LayerSums", "coders_together", "unproved"]


def coders_together(encoders: Sequence[SaeEncoder]) -> list[tuple[list[SaeEncoder], list[SaeEncoder]]]:
    """Return, of each coder of several layers, the encoders from its lowest layer on without a gap, then the others."""
    groups: dict[str, dict[int, SaeEncoder]] = {}
    for encoder in encoders:
        if layers := encoder.coder.layers:
            groups.setdefault(layers.release, {})[layers.position] = encoder
    found = []
    for group in groups.values():
        n_whole = next(position for position in range(len(group) + 1) if position not in group)
        positions = sorted(group)
        found.append(([group[one] for one in positions[:n_whole]], [group[one] for one in positions[n_whole:]]))
    return found


def unproved(encoder: SaeEncoder, whole: Sequence[SaeEncoder]) -> HealthCheck:
    """Return the check of a layer below which some are missing: `whole` are those that are there without a gap."""
    position = _layers(encoder).position
    missing = f"number {len(whole)} was not asked for"
    what = f"not proved: it is a sum over layers 0 to {position} of its coder, and {missing}"
    return HealthCheck("sae_fvu", encoder.identity.sae, None, what, None)


class LayerSums:
    """What the layers of one coder write on the first plain rows, summed up as they are added from below."""

    def __init__(self, n_layers: int) -> None:
        """Begin without a layer; only the first `n_layers` are summed up."""
        self._n_layers = n_layers
        self._n_added = 0
        self._sums: dict[int, torch.Tensor] = {}

    def add(self, encoder: SaeEncoder, rows: torch.Tensor, targets: torch.Tensor) -> HealthCheck:
        """Add the next layer and return its FVU: rows (row, d_in) that it reads, targets (row, d_out), plain rows.

        No more than 1,024 rows are used, as many as a proof needs. With fewer `ok` is None.
        """
        layers, rows, targets = _layers(encoder), rows[:ROWS_NEEDED].float(), targets[:ROWS_NEEDED].float()
        assert layers.position == self._n_added, "layers are added from below"
        self._n_added += 1
        features = encoder.features(rows)
        reconstruction = encoder.decode(features, rows) + self._sums.pop(layers.position, 0)
        for later in range(layers.position + 1, self._n_layers):
            self._write(later, features, layers.to(later))
        unexplained = float((targets - reconstruction).double().pow(2).sum())
        variance = float((targets.double() - targets.double().mean(dim=0)).pow(2).sum())
        fvu = unexplained / variance if variance else float("nan")
        expected = f"at most 1, summed over layers 0 to {layers.position} of its coder"
        ok = fvu <= 1 if len(rows) >= ROWS_NEEDED else None
        return HealthCheck("sae_fvu", encoder.identity.sae, fvu, expected, ok)

    def _write(self, later: int, features: torch.Tensor, decoder: object) -> None:
        import torch

        written = features @ torch.tensor(decoder, device=features.device)
        self._sums[later] = self._sums[later] + written if later in self._sums else written


def _layers(encoder: SaeEncoder) -> LayerDecoders:
    layers = encoder.coder.layers
    assert layers is not None, "a coder of one layer is proved alone"
    return layers
