"""What each feature writes into the residual stream: the directions that feature logits are read from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.models import LoadedModel
from actstore.saes import Encoder, SaeEncoder
from actstore.sites import Site, parse_site

if TYPE_CHECKING:
    import torch

__all__ = ["Directions", "directions_of"]

WRITTEN_AS_THEY_ARE = frozenset({"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"})


@dataclass(frozen=True, eq=False)
class Directions:
    """The directions (feature, d_model) of a coder's features; those of single dimensions are made only in blocks."""

    rows: torch.Tensor | None  # (feature, d_model) of any float dtype; None: feature i writes dimension i
    gain: torch.Tensor | None  # float32 (d_model) of a norm behind them
    n_features: int
    device: torch.device

    def blocks(self, size: int) -> Iterator[torch.Tensor]:
        """Yield float32 (up to `size` features, d_model), all features one after the other."""
        for first in range(0, self.n_features, size):
            block = self._rows(first, min(first + size, self.n_features))
            yield block if self.gain is None else block * self.gain

    def _rows(self, first: int, last: int) -> torch.Tensor:
        import torch

        if self.rows is not None:
            return self.rows[first:last].float()
        dimensions = torch.arange(first, last, device=self.device)
        return torch.nn.functional.one_hot(dimensions, self.n_features).float()


def directions_of(model: LoadedModel, encoder: Encoder) -> Directions | None:
    """Return what the features write: a coder's decoder rows, a neuron's own row of the matrix behind it.

    What lies in front of W_O or W_down goes through it, what lies in front of a post-norm through its gain. Norm scales
    are left out: they depend on the row. None where the site is not on the way into the residual stream: normalised
    inputs, queries.
    """
    import torch

    identity = encoder.identity
    way = _way(model, parse_site(identity.write_site or identity.site))
    if way is None:
        return None
    matrix, gain = way
    rows = matrix
    if isinstance(encoder, SaeEncoder):
        decoder = torch.from_numpy(encoder.coder.w_dec).to(model.device)
        rows = decoder if matrix is None else decoder @ matrix.float()
    return Directions(rows, gain, identity.width, model.device)


def _way(model: LoadedModel, site: Site) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    """Return the matrix (width, d_model) and the gain (d_model) between a site and the stream; None for no way."""
    if site.kind in WRITTEN_AS_THEY_ARE:
        return None, None
    if site.layer is None:
        return None
    if site.kind in ("z", "attn_out_raw"):
        w_o, gain = model.attention_output(site.layer)
        return (w_o if site.kind == "z" else None), gain
    if site.kind in ("mlp_act", "mlp_out_raw"):
        post_norm = model.family.mlp_post_norm
        gain = None if post_norm is None else model.norm(post_norm.format(layer=site.layer))[0]
        w_down = model.projection(model.family.mlp_output, site.layer)[0]
        return (w_down if site.kind == "mlp_act" else None), gain
    return None
