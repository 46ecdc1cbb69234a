"""The places of the sites in an architecture that nobody described, found by watching one layer run.

Which module feeds which is seen from the tensors themselves: a norm that gets the very tensor that the attention gave
stands behind the attention. No weights are needed, so it works before they are loaded. What is found is a guess: it
counts only once `prove` has passed on the weights. Queries, keys and values have no identity there, and are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from actstore.errors import UnsupportedFormat, explain

from .families import FAMILIES, Family, Norm, Tap

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["family_of_model"]

_SIZE_KEYS = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
_EPS_KEYS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_MLP_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
_SOFTCAP_KEY = "final_logit_softcapping"
_LINEAR = ("Linear", "Conv1D")  # the second keeps its weight as (in, out)
_T = TypeVar("_T")


class _NotFound(Exception):
    """A place that a family needs is not there, or is there twice; the text goes on after "by its structure …"."""


@dataclass(frozen=True, eq=False)
class _Call:
    """One module's run: its path below the model, and the first tensor in and out."""

    path: str
    module: torch.nn.Module
    given: torch.Tensor
    returned: torch.Tensor
    pattern: bool  # whether a (batch, head, query position, key position) tensor is returned beside it

    @property
    def kind(self) -> str:
        return type(self.module).__name__


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The parts of the first layer, and the norm behind the last."""

    layers: str
    block: _Call
    attention: _Call
    attention_output: _Call
    attention_post_norm: _Call | None
    mlp_pre_norm: _Call | None
    mlp: _Call
    mlp_output: _Call
    mlp_post_norm: _Call | None
    final: _Call

    def path(self, call: _Call) -> str:
        """Return the path of a part in any layer."""
        return f"{self.layers}.{{layer}}{call.path.removeprefix(self.block.path)}"

    def optional_path(self, call: _Call | None) -> str | None:
        return None if call is None else self.path(call)


def family_of_model(model: PreTrainedModel, name: str) -> Family:
    """Return the description of a model's architecture: ours, or one that is found by structure.

    Weights may be absent (the meta device). Raises UnsupportedFormat, naming the place that could not be found.
    """
    architecture = type(model).__name__
    if architecture in FAMILIES:
        return FAMILIES[architecture]
    try:
        return _family(model, _find(model))
    except _NotFound as missing:
        raise UnsupportedFormat(
            explain(
                f"{name} is a {architecture}, whose sites are not described, nor clear from its structure: {missing}",
                accepted=f"{', '.join(FAMILIES)}, and what is built like them",
                next_step="choose a model of a described architecture",
            )
        ) from missing


def _find(model: PreTrainedModel) -> _Found:
    config = model.config.get_text_config()
    if model.get_output_embeddings() is None:
        raise _NotFound("there is no head that predicts tokens")
    if missing := [key for key in _SIZE_KEYS if not hasattr(config, key)]:
        raise _NotFound(f"its config.json has no {missing[0]}")
    layers = _only("list of layers", [path for path, part in model.named_modules() if _holds_layers(part, config)])
    calls = _watch(model)
    first = f"{layers}.0"
    parts = [call for call in calls if call.path.rpartition(".")[0] == first]
    norms = [call for call in parts if "Norm" in call.kind]
    attention = _only("attention", [call for call in parts if "Attention" in call.kind])
    rest = [call for call in parts if call not in (attention, *norms) and any(call.module.children())]
    mlp = _only("MLP", rest)
    return _Found(
        layers=layers,
        block=_only("layer", [call for call in calls if call.path == first]),
        attention=attention,
        attention_output=_last_linear(calls, attention, config.hidden_size),
        attention_post_norm=_optional("norm behind attention", [n for n in norms if n.given is attention.returned]),
        mlp_pre_norm=_optional("norm before the MLP", [n for n in norms if n.returned is mlp.given]),
        mlp=mlp,
        mlp_output=_last_linear(calls, mlp, config.hidden_size),
        mlp_post_norm=_optional("norm behind the MLP", [n for n in norms if n.given is mlp.returned]),
        final=_final_norm(calls, layers),
    )


def _final_norm(calls: Sequence[_Call], layers: str) -> _Call:
    behind = [place for place, call in enumerate(calls) if call.path.startswith(f"{layers}.")][-1] + 1
    return _only("norm behind the last layer", [call for call in calls[behind:] if "Norm" in call.kind])


def _family(model: PreTrainedModel, found: _Found) -> Family:
    config = model.config.get_text_config()
    return Family(
        architecture=type(model).__name__,
        taps=_taps(found),
        final_norm=found.final.path,
        attention_output=found.path(found.attention_output),
        mlp_output=found.path(found.mlp_output),
        mlp_pre_norm=found.optional_path(found.mlp_pre_norm),
        attention_post_norm=found.optional_path(found.attention_post_norm),
        mlp_post_norm=found.optional_path(found.mlp_post_norm),
        norm=_norm(found.final),
        norm_gain_offset=_gain_offset(found.final.module, config.hidden_size),
        weights_are_inputs_first=found.mlp_output.kind == "Conv1D",
        norm_eps_key=_only("epsilon of the norms in config.json", [key for key in _EPS_KEYS if hasattr(config, key)]),
        d_mlp_key=_only("width of the MLP in config.json", [key for key in _MLP_KEYS if hasattr(config, key)]),
        final_softcap_key=_SOFTCAP_KEY if hasattr(config, _SOFTCAP_KEY) else None,
        discovered=True,
    )


def _taps(found: _Found) -> dict[str, Tap]:
    def output(call: _Call) -> Tap:
        return Tap(found.path(call), "output", "d_model")

    taps = {
        "resid_pre": Tap(found.path(found.block), "input", "d_model"),
        "z": Tap(found.path(found.attention_output), "input", "query_width"),
        "attn_out_raw": output(found.attention),
        "attn_out": output(found.attention_post_norm or found.attention),
        "mlp_act": Tap(found.path(found.mlp_output), "input", "d_mlp"),
        "mlp_out_raw": output(found.mlp),
        "mlp_out": output(found.mlp_post_norm or found.mlp),
        "resid_post": output(found.block),
        "final": Tap(found.final.path, "output", "d_model"),
    }
    reader = found.mlp_pre_norm or found.mlp
    if reader.given is not found.block.given:  # else the block is parallel
        taps["resid_mid"] = Tap(found.path(reader), "input", "d_model")
    if found.attention.pattern:
        taps["pattern"] = Tap(found.path(found.attention), "output", "n_heads", element=1)
    if found.mlp_pre_norm is not None:
        transform: Any = f"{_norm(found.mlp_pre_norm)}_normalized"
        taps["ln2"] = output(found.mlp_pre_norm)
        taps["ln2_normalized"] = Tap(found.path(found.mlp_pre_norm), "input", "d_model", transform=transform)
    return taps


def _watch(model: PreTrainedModel) -> list[_Call]:
    """Run three tokens through the body; return the runs of its modules in the order in which they ended."""
    import torch

    calls: list[_Call] = []
    ones = torch.ones((1, 3), dtype=torch.long, device=model.device)
    with ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            hooks.callback(module.register_forward_hook(_keep(path, calls), with_kwargs=True).remove)
        try:
            model.base_model(input_ids=ones, attention_mask=ones, position_ids=ones.cumsum(-1) - 1, use_cache=False)
        except Exception as error:  # whatever a model raises that cannot run like this
            raise _NotFound(f"it does not run without weights ({type(error).__name__}: {error})") from error
    return calls


def _keep(path: str, calls: list[_Call]) -> Callable[..., None]:
    def hook(module: Any, positional: Any, keywords: dict[str, Any], output: Any) -> None:
        given = positional[0] if positional else keywords.get("hidden_states")
        if given is not None:
            returned = output if isinstance(output, tuple) else (output, None)
            calls.append(_Call(path, module, given, returned[0], getattr(returned[1], "ndim", 0) == 4))

    return hook


def _holds_layers(module: torch.nn.Module, config: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers


def _last_linear(calls: Sequence[_Call], part: _Call, d_model: int) -> _Call:
    inside = [call for call in calls if call.path.startswith(f"{part.path}.") and call.kind in _LINEAR]
    writing = [call for call in inside if call.returned.shape[-1] == d_model]
    if not writing:
        raise _NotFound(f"no linear module in {part.path} writes {d_model} columns")
    return _only(f"run of {writing[-1].path}", [call for call in writing if call.path == writing[-1].path])


def _norm(norm: _Call) -> Norm:
    return "layer" if "LayerNorm" in norm.kind else "rms"


def _gain_offset(norm: torch.nn.Module, d_model: int) -> float:
    """Return 1 where the gain is 1 + weight: such a norm with weights of zero lets numbers through."""
    import torch

    probe = copy.deepcopy(norm).to_empty(device="cpu").float()
    if getattr(probe, "weight", None) is None:
        raise _NotFound("the final norm has no gain")
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        return float(probe(torch.linspace(-1, 1, d_model)).abs().max() > 0)


def _only(what: str, found: Sequence[_T]) -> _T:
    if len(found) != 1:
        raise _NotFound(f"there are {len(found)} candidates for the {what}")
    return found[0]


def _optional(what: str, found: Sequence[_T]) -> _T | None:
    return _only(what, found) if found else None
