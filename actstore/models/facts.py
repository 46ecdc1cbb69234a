"""The numbers of a model that its configuration tells, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actstore.errors import InvalidInput, explain
from actstore.sites import WITHOUT_LAYER, Site

from .families import Family, Tap

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ITEM_BYTES", "ModelFacts", "facts_from_config", "sites_of"]

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes of one model; `d_*` are widths, `n_*` are counts."""

    name: str  # hub id, or the folder's own name; never an absolute path
    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocabulary_size: int
    final_softcap: float | None
    norm_eps: float
    checkpoint_dtype: str
    n_parameters: int  # tied weights counted once
    max_positions: int | None = None  # where positions are learned vectors, of which there are so many
    trained_positions: int | None = None  # where positions are rotary: the model runs beyond them, and knows less
    parallel_blocks: bool = False  # attention and MLP both read resid_pre

    def __post_init__(self) -> None:
        counts = (self.n_layers, self.d_model, self.n_heads, self.n_kv_heads, self.d_head, self.d_mlp)
        if min(counts) < 1 or self.n_heads % self.n_kv_heads:
            raise InvalidInput(
                explain(
                    f"The configuration of {self.name} is not possible: layers, d_model, heads, key-value heads, "
                    f"d_head, d_mlp are {counts}",
                    accepted="positive sizes, with heads a multiple of key-value heads",
                )
            )

    @property
    def query_width(self) -> int:
        """Width of `z` and `q`: all heads concatenated; it need not equal `d_model`."""
        return self.n_heads * self.d_head

    @property
    def kv_width(self) -> int:
        """Width of `k` and `v`."""
        return self.n_kv_heads * self.d_head

    def width(self, tap: Tap) -> int:
        """Return the width of the tensor that a tap finds; of a pattern, the number of heads."""
        return int(getattr(self, tap.width))


def facts_from_config(config: PreTrainedConfig, family: Family, name: str, n_parameters: int) -> ModelFacts:
    """Return the facts of a configuration; raises InvalidInput where they make no sense."""
    text = config.get_text_config()  # itself, unless the model reads images too
    d_model, n_heads = int(text.hidden_size), int(text.num_attention_heads)
    return ModelFacts(
        name=name,
        architecture=family.architecture,
        n_layers=int(text.num_hidden_layers),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=int(getattr(text, "num_key_value_heads", None) or n_heads),
        d_head=int(getattr(text, "head_dim", None) or d_model // n_heads),
        d_mlp=int(getattr(text, family.d_mlp_key) or 4 * d_model),
        vocabulary_size=int(text.vocab_size),
        final_softcap=None if family.final_softcap_key is None else getattr(text, family.final_softcap_key, None),
        norm_eps=float(getattr(text, family.norm_eps_key)),
        checkpoint_dtype=_dtype_name(config, name),
        n_parameters=n_parameters,
        max_positions=getattr(config, "n_positions", None),  # GPT-2's name; rotary models have no hard end
        trained_positions=getattr(text, "max_position_embeddings", None),
        parallel_blocks=family.parallel_key is not None and bool(getattr(text, family.parallel_key)),
    )


def sites_of(family: Family, facts: ModelFacts) -> tuple[Site, ...]:
    """Return every site of a model, in forward order."""
    kinds = family.taps.keys() - ({"resid_mid"} if facts.parallel_blocks else set())
    found = [Site(kind) for kind in kinds & WITHOUT_LAYER]
    found += [Site(kind, layer) for kind in kinds - WITHOUT_LAYER for layer in range(facts.n_layers)]
    return tuple(sorted(found, key=lambda site: site.depth))


def _dtype_name(config: PreTrainedConfig, name: str) -> str:
    dtype = str(config.dtype or config.get_text_config().dtype or "float32").removeprefix("torch.")
    if dtype not in ITEM_BYTES:
        raise InvalidInput(explain(f"The dtype {dtype!r} of {name} is not known", accepted=", ".join(ITEM_BYTES)))
    return dtype
