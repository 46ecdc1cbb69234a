"""Sparse coders: found by name, read without trusting the file, run in fixed tiles, proved on real rows.

The home of npz and safetensors reading. Importing this package does not import torch; encoding does.
"""

from .arguments import ResolvedSae, SaeArgument, expand_sae_arguments, parse_sae_argument
from .coder import SparseCoder, check_width
from .encoder import SaeEncoder, round_mantissa
from .loading import SaeSizes, load_sae, sae_sizes
from .neurons import NEURONS, Encoder, NeuronEncoder, expand_neurons, without_neurons
from .proof import ROWS_NEEDED, compete, sae_health
from .screen import ENCODERS, ScreenEncoder
from .tile import EncodedTile, TileRows
from .together import LayerSums, coders_together, unproved

__all__ = [
    "ENCODERS",
    "NEURONS",
    "ROWS_NEEDED",
    "EncodedTile",
    "Encoder",
    "LayerSums",
    "NeuronEncoder",
    "ResolvedSae",
    "SaeArgument",
    "SaeEncoder",
    "SaeSizes",
    "ScreenEncoder",
    "SparseCoder",
    "TileRows",
    "check_width",
    "coders_together",
    "compete",
    "expand_neurons",
    "expand_sae_arguments",
    "load_sae",
    "parse_sae_argument",
    "round_mantissa",
    "sae_health",
    "sae_sizes",
    "unproved",
    "without_neurons",
]
