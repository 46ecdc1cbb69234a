"""Coders of several layers: each layer reads its own site and writes those of its own and of all later layers.

    x_hat[l] = Σ over i ≤ l of f_i @ w_dec_i[:, l] + b_dec_l (+ x_l @ skip_l)

A file holds one layer: w_dec (d_sae, layer, d_out) over all layers. A `SparseCoder` of it has the decoder to its own
layer, and knows where the others lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from actstore.errors import MissingInput, explain

from .tensors import TensorHeader, map_tensor, read_tensors

__all__ = ["LayerDecoders", "layer_faults"]

_FEATURES_AT_ONCE = 256
_NOTHING = 1e-6  # of the largest weight: what training left of a decoder that has no part in any sum


@dataclass(frozen=True)
class LayerDecoders:
    """The decoders of one layer of a coder of several: which layer it is, and where they lie."""

    release: str  # the folder of all layers
    position: int  # of this layer among them
    path: Path
    header: TensorHeader

    def to(self, position: int) -> npt.NDArray[np.float32]:
        """Return the decoder to a layer, float32 (d_sae, d_out); raises MissingInput where the file is gone."""
        try:
            with self.path.open("rb") as file:
                return read_tensors(file, {"w_dec": self.header.at(position)})["w_dec"]
        except FileNotFoundError as error:
            raise MissingInput(explain(f"The file {self.path} is not there any more")) from error


def layer_faults(file: IO[bytes], header: TensorHeader, position: int) -> list[str]:
    """Return whether decoders (d_sae, layer, d_out) have NaN or infinity, or write layers below their own."""
    decoders = map_tensor(file, header)
    largest = np.zeros(header.shape[1], np.float32)  # of each layer; NaN stays
    for first in range(0, len(decoders), _FEATURES_AT_ONCE):
        block = np.abs(decoders[first : first + _FEATURES_AT_ONCE].astype(np.float32))
        largest = np.maximum(largest, block.max(axis=(0, 2)))
    if not np.isfinite(largest).all():
        return ["w_dec has NaN or infinity"]
    below = [layer for layer in range(position) if largest[layer] > _NOTHING * largest.max()]
    return [f"w_dec writes layer number {below[0]}, below its own, which is number {position}"] if below else []
