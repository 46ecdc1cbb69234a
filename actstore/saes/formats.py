"""The layouts that are read, each known by its files: nothing in a file is tried out to find what it is.

Most have one SAE in a folder; where a folder holds several, the path of its weights says which one is meant.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from actstore.errors import InvalidInput, MissingInput, explain

from . import dictionary_learning, gemma_scope, llama_scope, multi_layer, openai, qwen_scope, saelens, sparsify
from .config import Config
from .declaration import Declaration

__all__ = ["FORMATS", "GEMMA_SCOPE", "Format", "format_of_file", "recognise"]


@dataclass(frozen=True)
class Format:
    """One layout: the paths of its files inside an SAE's folder, and who understands its configuration."""

    name: str
    weights: str  # a pattern where the weights of several SAEs lie in one folder
    config: str | None
    declare: Callable[[Config, str], Declaration]  # with the path of the folder, of the weights where it has several
    pickled: bool = False  # read only where the user says so
    values: frozenset[str] = frozenset()  # of the weights that are no arrays, and are read as its configuration

    @property
    def files(self) -> str:
        """Return its files, for messages."""
        return f"{self.weights} and {self.config}" if self.config else self.weights

    @property
    def described_by(self) -> str:
        """Return what says how its weights are to be read, for messages."""
        return self.config or ("file" if self.values else "path")

    @property
    def shares_folders(self) -> bool:
        """Whether a folder may hold several SAEs."""
        return glob.has_magic(self.weights)

    def names(self, path: str) -> bool:
        """Return whether a path is that of weights of this layout."""
        return fnmatchcase(self.taken_apart(path)[1], self.weights)

    def taken_apart(self, path: str) -> tuple[str, str]:
        """Return the folder, and the path in it, of a path of weights."""
        parts = path.split("/")
        depth = self.weights.count("/") + 1
        return "/".join(parts[:-depth]), "/".join(parts[-depth:])


GEMMA_SCOPE = Format("Gemma Scope", "params.npz", None, gemma_scope.declare_first)
FORMATS = (
    GEMMA_SCOPE,
    Format("Gemma Scope 2", "params.safetensors", "config.json", gemma_scope.declare_second),
    Format("Gemma Scope 2, several layers", "params_layer_[0-9]*.safetensors", None, multi_layer.declare_layer),
    Format("SAELens", "sae_weights.safetensors", "cfg.json", saelens.declare),
    Format("sparsify", "sae.safetensors", "cfg.json", sparsify.declare),
    Format("dictionary_learning", "ae.pt", "config.json", dictionary_learning.declare, pickled=True),
    Format("Llama Scope", "checkpoints/final.safetensors", "hyperparams.json", llama_scope.declare),
    Format("OpenAI", "autoencoders/[0-9]*.pt", None, openai.declare, pickled=True, values=openai.VALUES),
    Format("Qwen-Scope", "layer[0-9]*.sae.pt", None, qwen_scope.declare, pickled=True),
)


def recognise(folder: str, files: Collection[str]) -> tuple[Format, list[str]] | None:
    """Return the format of a folder by the paths of the files in it, and its weights; None where it holds none.

    Raises InvalidInput where there are several formats, MissingInput where the configuration is not beside the weights.
    """
    found = {
        one: [file for file in sorted(files) if one.taken_apart(file)[0] == "" and one.names(file)] for one in FORMATS
    }
    found = {format_: weights for format_, weights in found.items() if weights}
    if len(found) > 1:
        first = [weights[0] for weights in found.values()]
        raise InvalidInput(
            explain(
                f"{folder} holds the weights of several SAEs: {', '.join(first)}",
                next_step=f"name one of the files: {folder}/{first[0]}",
            )
        )
    for format_, weights in found.items():
        if format_.config and format_.config not in files:
            raise MissingInput(
                explain(
                    f"{folder} holds {weights[0]} without {format_.config}, which says how to read it",
                    accepted="; ".join(format_.files for format_ in FORMATS),
                    next_step=f"fetch {format_.config} from where the weights are from",
                )
            )
        return format_, weights
    return None


def format_of_file(path: str) -> Format | None:
    """Return the format whose weights a path names, or None."""
    return next((format_ for format_ in FORMATS if format_.names(path)), None)
