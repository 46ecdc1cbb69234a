"""The shares that an SAE's features have of what it reconstructs, with its biases and its error apart."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from actstore.sites import parse_site
from actstore.store import StoreReader

from .directions import Directions, is_neurons
from .shares import Shares, Values
from .stored import firings_of_rows, vectors_of_rows

__all__ = ["add_features"]

NUMBERS_PER_BLOCK = 1 << 22


def add_features(
    shares: Shares,
    reader: StoreReader,
    directions: Directions,
    sae: str,
    rows: npt.NDArray[np.int64],
    values: Values,
    direction: Values,
) -> None:
    """Add what features, decoder bias, skip and error add: together values · direction of each row.

    values (row, width): the site that the SAE reconstructs, as stored; direction (row, width): what is read from it.
    The activations are the stored ones, so the error has what their rounding, and firings that are not kept, leave.
    Raises MissingInput where the SAE's weights were left out of the kit.
    """
    coder = directions.coder(sae)
    layer = directions.written(sae).layer
    whole, before = np.einsum("rd,rd->r", values, direction), shares.total()
    firings = firings_of_rows(reader, sae, rows)
    of_row = np.repeat(np.arange(len(rows)), firings.counts)
    activations = firings.activations.astype(np.float64)
    if is_neurons(coder):
        shares.add_features(of_row, firings.features, activations * direction[of_row, firings.features], layer)
    else:
        piece = reader.kit.piece(directions.weights(sae))
        factor, mean = _undone(values, str(piece.attrs["normalisation"]))
        read = _products(directions, sae, firings.features, direction, of_row)
        shares.add_features(of_row, firings.features, activations * factor[of_row] * read, layer)
        bias = np.asarray(piece["b_dec"]).astype(np.float64)
        shares.add("feature_bias", factor * (direction @ bias) + mean * direction.sum(axis=1), layer)
        if "w_skip" in piece and f"sites/{coder['site']}" in reader.layout.artifacts:
            read_rows = vectors_of_rows(reader, str(parse_site(coder["site"])), rows)
            skipped = np.einsum("rd,rd->r", read_rows, direction @ np.asarray(piece["w_skip"]).T)
            shares.add("feature_skip", skipped, layer)
    shares.add("feature_error", whole - (shares.total() - before), layer)


def _products(
    directions: Directions,
    sae: str,
    features: npt.NDArray[np.int64],
    direction: Values,
    of_row: npt.NDArray[np.intp],
) -> Values:
    """Return each firing's decoder row · direction of its row: float64 (firing)."""
    distinct, which = np.unique(features, return_inverse=True)
    decoder = directions.decoder_rows(sae, distinct)
    step = max(1, NUMBERS_PER_BLOCK // direction.shape[1])
    parts = [slice(first, first + step) for first in range(0, len(features), step)]
    products = [np.einsum("pd,pd->p", decoder[which[part]], direction[of_row[part]]) for part in parts]
    return np.concatenate([np.empty(0), *products])


def _undone(values: Values, normalisation: str) -> tuple[Values, Values]:
    """Return by what a reconstruction of normalised rows is multiplied, and what is added to it, float64 (row).

    As `actstore.saes.rules` does it.
    """
    ones, zeros = np.ones(len(values)), np.zeros(len(values))
    if normalisation == "none":
        return ones, zeros
    if normalisation == "constant_norm_rescale":
        return np.linalg.norm(values, axis=1) / values.shape[1] ** 0.5, zeros
    deviation = values.std(axis=1, ddof=1) if normalisation == "layer_norm" else ones
    return deviation, values.mean(axis=1)
