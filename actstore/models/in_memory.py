"""A transformers model that the user already holds: described and checked like one from disk, never moved or cast."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.errors import InvalidInput, explain
from actstore.recipe import COMPUTE_DTYPES, ModelIdentity

from .description import config_digest
from .digests import digest_of_tensors
from .discovery import family_of_model
from .facts import facts_from_config
from .loaded import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["adopt_model"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


def adopt_model(causal_lm: PreTrainedModel, *, dtype: str | None, device: str) -> LoadedModel:
    """Return a model in memory, ready to be captured; it is put into evaluation mode and eager attention.

    Raises InvalidInput for what is not a transformers model, or is in another dtype or on another device than asked
    for; UnsupportedFormat where its architecture is not described.
    """
    from transformers import PreTrainedModel

    if not isinstance(causal_lm, PreTrainedModel):
        raise InvalidInput(
            explain(f"A {type(causal_lm).__name__} is no model", accepted="a folder, a hub id or a PreTrainedModel")
        )
    name, architecture = _name(causal_lm), type(causal_lm).__name__
    _check_placement(causal_lm, dtype, device)
    _make_eager(causal_lm)  # first: other implementations return no patterns to be found
    family = family_of_model(causal_lm.eval(), name)
    n_parameters = sum(parameter.numel() for parameter in causal_lm.parameters())
    config = json.loads(causal_lm.config.to_json_string()) | {"architectures": [architecture]}
    commit = str(getattr(causal_lm.config, "_commit_hash", None))
    identity = ModelIdentity(
        name=name,
        revision=commit if _COMMIT.fullmatch(commit) else None,
        architecture=architecture,
        config_digest=config_digest(config),
        weights_digest=digest_of_tensors(causal_lm),
    )
    facts = facts_from_config(causal_lm.config, family, name, n_parameters)
    return LoadedModel(facts, identity, family, causal_lm)


def _name(causal_lm: PreTrainedModel) -> str:
    """Return the hub id, or the last part of a path: an absolute path tells of the machine, not of the model."""
    path = str(causal_lm.config._name_or_path or "")
    looks_like_hub_id = not Path(path).is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", path)
    return path if looks_like_hub_id else Path(path).resolve().name if path else "in-memory"


def _check_placement(causal_lm: PreTrainedModel, dtype: str | None, device: str) -> None:
    places = {str(parameter.device) for parameter in causal_lm.parameters()}
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in causal_lm.parameters()}
    if len(places) > 1 or "meta" in places or len(dtypes) > 1:
        raise InvalidInput(
            explain(
                f"The model is spread over {_list(places)} in {_list(dtypes)}",
                accepted="one device and one dtype",
                next_step="to spread a model over devices give its folder or hub id, and device_map='auto'",
            )
        )
    found_dtype, place = dtypes.pop(), places.pop()
    if found_dtype not in COMPUTE_DTYPES or dtype not in (None, found_dtype):
        _refuse("dtype", found_dtype, dtype or " or ".join(COMPUTE_DTYPES), "model.to(torch.bfloat16)")
    if device not in ("auto", place, place.split(":")[0]):
        _refuse("device", place, device, f"model.to({device!r})")


def _refuse(what: str, found: str, wanted: str, remedy: str) -> None:
    raise InvalidInput(
        explain(f"The model in memory has {what} {found!r}", accepted=wanted, next_step=f"convert it first: {remedy}")
    )


def _list(values: set[Any]) -> str:
    return ", ".join(sorted(values))


def _make_eager(causal_lm: PreTrainedModel) -> None:
    text = causal_lm.config.get_text_config()
    if text._attn_implementation != "eager":
        causal_lm.set_attn_implementation("eager")
    if text._attn_implementation != "eager":
        raise InvalidInput(
            explain(
                f"The attention of {type(causal_lm).__name__} cannot be switched to 'eager'",
                next_step="load the model with attn_implementation='eager'",
            )
        )
