"""The layouts that are read, each known by its files: nothing in a file is tried out to find what it is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from actstore.errors import InvalidInput, MissingInput, explain

from . import dictionary_learning, gemma_scope, llama_scope, saelens, sparsify
from .config import Config
from .declaration import Declaration

__all__ = ["FORMATS", "GEMMA_SCOPE", "Format", "format_of_file", "recognise"]


@dataclass(frozen=True)
class Format:
    """One layout: the paths of its files inside an SAE's folder, and who understands its configuration."""

    name: str
    weights: str
    config: str | None
    declare: Callable[[Config, str], Declaration]
    pickled: bool = False  # read only where the user says so

    @property
    def files(self) -> str:
        """Return its files, for messages."""
        return f"{self.weights} and {self.config}" if self.config else self.weights


GEMMA_SCOPE = Format("Gemma Scope", "params.npz", None, gemma_scope.declare_first)
FORMATS = (
    GEMMA_SCOPE,
    Format("Gemma Scope 2", "params.safetensors", "config.json", gemma_scope.declare_second),
    Format("SAELens", "sae_weights.safetensors", "cfg.json", saelens.declare),
    Format("sparsify", "sae.safetensors", "cfg.json", sparsify.declare),
    Format("dictionary_learning", "ae.pt", "config.json", dictionary_learning.declare, pickled=True),
    Format("Llama Scope", "checkpoints/final.safetensors", "hyperparams.json", llama_scope.declare),
)


def recognise(folder: str, files: Collection[str]) -> Format | None:
    """Return the format of a folder by the paths of the files in it, or None where it holds no weights that are read.

    Raises InvalidInput where there are several, MissingInput where the configuration is not beside the weights.
    """
    found = [format_ for format_ in FORMATS if format_.weights in files]
    if len(found) > 1:
        raise InvalidInput(
            explain(
                f"{folder} holds the weights of several SAEs: {', '.join(format_.weights for format_ in found)}",
                next_step=f"name one of the files: {folder}/{found[0].weights}",
            )
        )
    for format_ in found:
        if format_.config and format_.config not in files:
            raise MissingInput(
                explain(
                    f"{folder} holds {format_.weights} without {format_.config}, which says how to read it",
                    accepted="; ".join(format_.files for format_ in FORMATS),
                    next_step=f"fetch {format_.config} from where the weights are from",
                )
            )
    return found[0] if found else None


def format_of_file(path: str) -> Format | None:
    """Return the format whose weights a path names, or None."""
    return next((format_ for format_ in FORMATS if f"/{path}".endswith(f"/{format_.weights}")), None)
