"""Hugging Face models: loaded safely, with every site's place known per architecture and proved.

The home of transformers. Importing this package imports neither torch nor transformers; loading a model does.
"""

from .description import ModelDescription, describe_model
from .facts import ModelFacts
from .loaded import LoadedModel
from .loading import choose_device, load_model
from .proof import prove
from .unembedding import Unembedding, logits, unembedding_of

__all__ = [
    "LoadedModel",
    "ModelDescription",
    "ModelFacts",
    "Unembedding",
    "choose_device",
    "describe_model",
    "load_model",
    "logits",
    "prove",
    "unembedding_of",
]
