"""What can be said of a model before its weights are loaded; refuses early what could not be captured later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from actstore.errors import InvalidInput, MissingInput, UnsupportedFormat, explain
from actstore.recipe import COMPUTE_DTYPES
from actstore.sealed import digest_of
from actstore.sites import Site

from .discovery import family_of_model
from .facts import ModelFacts, facts_from_config, sites_of
from .families import Family
from .hub import ModelFolder, find_model
from .versions import check_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

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
    family: Family
    revision: str | None
    config_digest: str

    def sites(self) -> tuple[Site, ...]:
        """Return every site of the model, in forward order."""
        return sites_of(self.family, self.facts)

    def site_width(self, site: Site) -> int:
        """Return the width of one of `sites`; of a pattern, its columns for each key: the heads."""
        return self.facts.width(self.family.taps[site.kind])


def describe_model(source: str | Path, *, revision: str | None = None) -> ModelDescription:
    """Describe a model from its configuration: a folder, or a hub id (of which only config.json is fetched).

    Raises MissingInput where it is not there, InvalidInput where its configuration is broken or it is not a causal
    language model, UnsupportedFormat where its architecture is not described, MissingDependency where transformers is
    too old.
    """
    check_transformers()
    return describe_folder(find_model(source, revision, weights=False))


def describe_folder(folder: ModelFolder) -> ModelDescription:
    """Describe the model in a folder; raises as `describe_model` does."""
    body = _read_json(folder)
    _refuse_other_than_causal(body, folder.name)
    _refuse_remote_code(body, folder.name)
    _refuse_quantized(body, folder.name)
    skeleton = _skeleton(read_config(folder), folder.name)
    family = family_of_model(skeleton, folder.name)
    n_parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    facts = facts_from_config(skeleton.config, family, folder.name, n_parameters)
    return ModelDescription(facts, family, folder.revision, config_digest(body))


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


def _refuse_other_than_causal(body: Mapping[str, Any], name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = body.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise _broken(name, f"'architectures' is {named!r}, where one class name is needed")
    if named[0] not in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise InvalidInput(
            explain(
                f"{name} is a {named[0]}, which is not a causal language model{_reason(body, named[0])}",
                accepted="models that predict the next token, such as Gemma2ForCausalLM; remote code is never run",
            )
        )


def _refuse_remote_code(body: Mapping[str, Any], name: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if "auto_map" in body and body.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise InvalidInput(
            explain(
                f"{name} is of the type {body.get('model_type')!r}, which only code in its own repository knows",
                accepted="models that transformers itself has; remote code is never run",
            )
        )


def _refuse_quantized(body: Mapping[str, Any], name: str) -> None:
    if quantization := body.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedFormat(
            explain(
                f"The weights of {name} are quantised ({method}), and no identity of its sites could be proved",
                accepted=" or ".join(COMPUTE_DTYPES),
                next_step="give the model that was quantised",
            )
        )


def _reason(body: Mapping[str, Any], architecture: str) -> str:
    """Return why a model of an architecture that is not causal cannot be captured."""
    from transformers.models.auto import modeling_auto

    two_streams = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if body.get("is_encoder_decoder") is True or architecture in two_streams.values():
        return ": an encoder-decoder has two residual streams, and `layer` would name two places"
    if body.get("model_type") in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return ": in an encoder every token sees those behind it, and none is predicted from those before"
    if architecture in modeling_auto.MODEL_MAPPING_NAMES.values():
        return ": the head that predicts tokens is missing"
    return " that transformers knows"


def _skeleton(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """Return the model without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
            return model.eval()
    except Exception as error:  # sizes that do not fit each other surface as many kinds
        raise _broken(name, error) from error
