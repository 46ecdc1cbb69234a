"""What can be said of a model before its weights are loaded; refuses early what could not be captured later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from actstore.errors import InvalidInput, MissingInput, explain
from actstore.sealed import digest_of
from actstore.sites import Site

from .facts import ModelFacts, facts_from_config, sites_of
from .families import family_of
from .hub import ModelFolder, find_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ModelDescription", "config_digest", "describe_folder", "describe_model", "read_config"]

# Keys that do not change what is computed here: who wrote the file and where, and what a recipe says itself.
_VOLATILE = frozenset(
    {
        "transformers_version",
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "use_cache",
        "dtype",
        "torch_dtype",
    }
)


@dataclass(frozen=True)
class ModelDescription:
    """The facts of a model and the parts of its identity that need no weights."""

    facts: ModelFacts
    revision: str | None
    config_digest: str

    def sites(self) -> tuple[Site, ...]:
        """Return every site of the model, in forward order."""
        return sites_of(family_of(self.facts.architecture, self.facts.name), self.facts)

    def site_width(self, site: Site) -> int:
        """Return the width of one of `sites`."""
        return self.facts.width(family_of(self.facts.architecture, self.facts.name).taps[site.kind])


def describe_model(source: str | Path, *, revision: str | None = None) -> ModelDescription:
    """Describe a model from its configuration: a folder, or a hub id (of which only config.json is fetched).

    Raises MissingInput where it is not there, InvalidInput where its configuration is broken or it is not a causal
    language model, UnsupportedFormat where its architecture is not described.
    """
    return describe_folder(find_model(source, revision, weights=False))


def describe_folder(folder: ModelFolder) -> ModelDescription:
    """Describe the model in a folder; raises as `describe_model` does."""
    body = _read_json(folder)
    family = family_of(_causal_architecture(body, folder.name), folder.name)
    config = read_config(folder)
    facts = facts_from_config(config, family, folder.name, _count_parameters(config, folder.name))
    return ModelDescription(facts, folder.revision, config_digest(body))


def config_digest(body: Mapping[str, Any]) -> str:
    """Return the digest of a configuration, without the keys that say only who wrote it and where."""
    return digest_of({key: value for key, value in body.items() if key not in _VOLATILE})


def read_config(folder: ModelFolder) -> PreTrainedConfig:
    """Return the configuration as transformers reads it; raises InvalidInput where it refuses."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds for a value it does not like
        raise _broken(folder.name, error) from error


def _read_json(folder: ModelFolder) -> dict[str, Any]:
    path = folder.path / "config.json"
    if not path.is_file():
        raise MissingInput(
            explain(f"The folder of {folder.name} has no config.json", accepted="a folder that `save_pretrained` wrote")
        )
    try:
        body = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except ValueError as error:
        raise _broken(folder.name, error) from error
    if not isinstance(body, dict):
        raise _broken(folder.name, f"it holds a {type(body).__name__}, not an object")
    return body


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _broken(name: str, reason: object) -> InvalidInput:
    return InvalidInput(explain(f"The config.json of {name} is broken: {reason}", next_step="fetch the model again"))


def _causal_architecture(body: Mapping[str, Any], name: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = body.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise _broken(name, f"'architectures' is {named!r}, where one class name is needed")
    if named[0] not in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise InvalidInput(
            explain(
                f"{name} is a {named[0]}, which is not a causal language model that transformers knows",
                accepted="models that predict the next token, such as Gemma2ForCausalLM; remote code is never run",
            )
        )
    return named[0]


def _count_parameters(config: PreTrainedConfig, name: str) -> int:
    """Build the model without memory for its weights, and count them."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:  # sizes that do not fit each other surface as many kinds
        raise _broken(name, error) from error
    return sum(parameter.numel() for parameter in model.parameters())
