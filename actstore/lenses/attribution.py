"""Direct attribution offline (the "logit prism"): what each part of the model adds to a token's logit.

The last residual stream x is a sum: a state of the stream, then every attn_out and mlp_out after it. With the final
norm's scale s frozen at its actual value the logit before the soft cap is linear in x, so each summand u has its share:

    RMS norm:    u · (w ∘ g) / s                     w: the token's row of the unembedding, or a difference of two
    layer norm:  (u − mean(u)) · (w ∘ g) / s, and once  w · b

A head's u is z_h @ W_O[h], behind a post-norm (Gemma, OLMo 2) times its gain over the scale of all heads together; the
projection's bias is a term of its own. A feature's u is its activation times its direction. What is left between the
sum and the logit of the stored stream, by storing rounded numbers, is the term `rounding`.

After "A Mathematical Framework for Transformer Circuits" (Elhage et al. 2021), the paths straight to the logits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.store import StoreReader

from .decomposition import Part, decompose
from .directions import Directions, Output
from .features import add_features
from .shares import Shares, Values
from .stored import vectors_of_rows
from .unembeddings import Unembeddings

__all__ = ["VOCABULARY_MEAN", "Prism", "read_through"]

VOCABULARY_MEAN = -1
_NOTHING = -(1 << 40)  # of `against`: no other token; no id that can be given
ROWS_PER_BLOCK = 256

Rows = npt.NDArray[np.int64]


class Prism:
    """Attributions over one snapshot of a store."""

    def __init__(self, reader: StoreReader, directions: Directions, unembeddings: Unembeddings) -> None:
        self._reader, self._directions, self._unembeddings = reader, directions, unembeddings

    def contributions(self, rows: pa.Array, token_ids: pa.Array, against: pa.Array, sae: str | None) -> pa.Array:
        """Return the parts of each row's logit before the soft cap, as `ATTRIBUTION_TYPE`; they sum to it.

        against: another token's id, VOCABULARY_MEAN, or NULL. sae: whose features are told apart.
        Raises MissingInput where the last resid_post, or what the SAE's features need, is not stored or not in the kit,
        UnknownName for rows, tokens or SAEs that do not exist.
        """
        numbers, tokens = np.asarray(rows, np.int64), np.asarray(token_ids, np.int64)
        others = np.asarray(against.cast(pa.int64()).fill_null(_NOTHING))
        parts = [slice(first, first + ROWS_PER_BLOCK) for first in range(0, len(numbers), ROWS_PER_BLOCK)]
        return pa.concat_arrays([self._block(numbers[part], tokens[part], others[part], sae) for part in parts])

    def _block(self, rows: Rows, token_ids: Rows, against: Rows, sae: str | None) -> pa.Array:
        plan = decompose(self._reader, None if sae is None else self._directions.written(sae))
        artifact = f"sites/{plan.last}"
        unembed, last = self._unembeddings.of(artifact), vectors_of_rows(self._reader, str(plan.last), rows)
        weights = self._weights(artifact, token_ids, against)
        read, constant = unembed.pulled_back(last, weights)
        shares = Shares(len(rows))
        for part in plan.parts:
            self._add(shares, part, rows, read, sae)
        if unembed.has_norm_bias:
            shares.add("final_norm_bias", constant)
        shares.add("rounding", unembed.before_cap(last, weights) - shares.total())
        return shares.lists()

    def _weights(self, artifact: str, token_ids: Rows, against: Rows) -> Values:
        """Return the direction of the unembedding that each row is about: float64 (row, d_model)."""
        weights = self._unembeddings.token_rows(artifact, token_ids).astype(np.float64)
        named, mean = against != _NOTHING, against == VOCABULARY_MEAN
        if mean.any():
            weights[mean] -= self._unembeddings.of(artifact).mean_row
        weights[named & ~mean] -= self._unembeddings.token_rows(artifact, against[named & ~mean])
        return weights

    def _add(self, shares: Shares, part: Part, rows: Rows, read: Values, sae: str | None) -> None:
        """Add the shares of one summand of the stream: whole, by its heads, or by features."""
        site, layer = part.site, None if part.name == "embedding" else part.site.layer
        values = vectors_of_rows(self._reader, str(site), rows).astype(np.float64)
        output = self._directions.output(site, f"sites/{site}")
        behind, direction = read_through(output, values, read)
        if part.by_features:
            assert sae is not None
            add_features(shares, self._reader, self._directions, sae, rows, values, direction)
        elif site.kind == "z":
            heads = (values * direction).reshape(len(rows), output.n_heads, -1).sum(axis=2)
            for head in range(output.n_heads):
                shares.add("head", heads[:, head], layer, head)
        else:
            shares.add(part.name, np.einsum("rd,rd->r", values, direction), layer)
        if output.bias is not None:
            shares.add(f"{part.name}_bias", behind @ output.bias.astype(np.float64), layer)


def read_through(output: Output, values: Values, read: Values) -> tuple[Values, Values]:
    """Return what is read from behind the projection (row, d_model), and from the site itself (row, width of the site).

    values (row, width) are the site's, read (row, d_model) what is read from the stream. A post-norm's scale is frozen
    at what these values make it.
    """
    weight = None if output.weight is None else output.weight.astype(np.float64)
    if output.gain is not None:
        raw = values if weight is None else values @ weight
        raw = raw if output.bias is None else raw + output.bias
        scale = np.sqrt(np.mean(raw * raw, axis=1, keepdims=True) + output.norm_epsilon)
        read = read * output.gain / scale
    return read, (read if weight is None else read @ weight.T)
