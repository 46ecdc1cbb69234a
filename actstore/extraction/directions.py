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

__all__ = ["PROJECTED", "WRITTEN_AS_THEY_ARE", "Directions", "Way", "directions_of", "way_of", "written_site"]

PROJECTED = frozenset({"z", "attn_out_raw", "mlp_act", "mlp_out_raw"})  # they reach the stream through weights
WRITTEN_AS_THEY_ARE = frozenset({"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"})


@dataclass(frozen=True, eq=False)
class Way:
    """What lies between a site and the residual stream: a projection, a norm behind it, both or neither.

    weight (site, d_model) in the model's dtype; bias and gain float32 (d_model); each None where there is none.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    gain: torch.Tensor | None = None


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


def directions_of(way: Way | None, encoder: Encoder, device: torch.device) -> Directions | None:
    """Return what the features write: a coder's decoder rows, a neuron's own row of the matrix behind it.

    way: of the site that is written. What lies in front of W_O or W_down goes through it, what lies in front of a
    post-norm through its gain. Norm scales are left out: they depend on the row. None where the site is not on the way
    into the residual stream: normalised inputs, queries.
    """
    import torch

    if way is None:
        return None
    rows = way.weight
    if isinstance(encoder, SaeEncoder):
        decoder = torch.from_numpy(encoder.coder.w_dec).to(device)
        # Contiguous: a view of the model's own weight would be multiplied in another order than the kit's copy of it.
        rows = decoder if rows is None else decoder @ rows.float().contiguous()
    elif rows is not None:
        rows = rows.contiguous()
    return Directions(rows, way.gain, encoder.identity.width, device)


def written_site(encoder: Encoder) -> Site:
    """Return the site whose rows the features add up to."""
    return parse_site(encoder.identity.write_site or encoder.identity.site)


def way_of(model: LoadedModel, site: Site) -> Way | None:
    """Return what lies between a site and the residual stream; None where it is not on the way into the stream."""
    if site.kind in WRITTEN_AS_THEY_ARE:
        return Way()
    if site.layer is None or site.kind not in PROJECTED:
        return None
    if site.kind in ("z", "attn_out_raw"):
        weight, gain = model.attention_output(site.layer)
        bias = model.projection(model.family.attention_output, site.layer)[1]
    else:
        weight, bias = model.projection(model.family.mlp_output, site.layer)
        post_norm = model.family.mlp_post_norm
        gain = None if post_norm is None else model.norm(post_norm.format(layer=site.layer))[0]
    return Way(weight, bias, gain) if site.kind in ("z", "mlp_act") else Way(gain=gain)
