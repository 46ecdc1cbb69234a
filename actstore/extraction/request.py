"""What somebody asked to extract, as plain values, before anything is looked up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore.corpus import Window
from actstore.errors import InvalidInput, explain
from actstore.recipe import NOTHING_ASKED, SAE_PRECISIONS

__all__ = ["EncodeRequest", "Request"]

DEFAULT_CONTEXT = 1024
DEFAULT_SHARD_ROWS = 16_384
DEFAULT_BATCH_TOKENS = 8_192
MAX_ACTIVATION_BITS = 23


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that `actstore extract` can be told; `dataset` may be None for a store that has its corpus."""

    model: Any  # hub id, path, or a loaded model
    out: Path
    dataset: Any = None
    tokenizer: Any = None  # hub id, path, or a loaded tokenizer; None: the model's own
    sites: tuple[str, ...] = ()
    saes: tuple[str, ...] = ()
    lens_k: int = 0
    lens_sites: tuple[str, ...] = ()
    attention_top: int = 0
    attention_min: float = 0.005
    neurons_top: int = 64
    sae_weights: bool = True  # kept in the kit; False: queries that need them say so
    predictions: bool | None = None  # None: yes, unless the store has them already
    context: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    text_field: str = "text"
    chat_field: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    revision: str | None = None
    dtype: str | None = None
    storage_dtype: str | None = None
    device: str = "auto"
    device_map: str | None = None
    activation_bits: int = 10
    sae_precision: str = "float32"
    encode_special: bool = False
    shard_rows: int | None = None
    batch_tokens: int | None = None
    into: bool = False
    append: Any = None
    mixed: bool = False
    allow_unhealthy: bool = False
    allow_pt: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out).expanduser())
        if not (self.sites or self.saes or self.lens_k or self.attention_top or self.predictions):
            raise InvalidInput(NOTHING_ASKED)
        _check_firings(self.activation_bits, self.neurons_top, self.sae_precision)
        if self.attention_top < 0 or not 0 <= self.attention_min <= 1:
            raise InvalidInput(
                explain(
                    f"--attention-top is {self.attention_top}, --attention-min {self.attention_min}",
                    accepted="how many keys to keep of each row, 0 or more; a weight from 0 to 1",
                )
            )
        if self.lens_k < 0 or (self.lens_sites and not self.lens_k):
            raise InvalidInput(
                explain(
                    f"--lens is {self.lens_k} with {len(self.lens_sites)} lens sites",
                    accepted="how many tokens to keep of each read-out, 1 or more",
                    next_step="give --lens 5",
                )
            )
        for name, value in (("shard-rows", self.shard_rows), ("batch-tokens", self.batch_tokens)):
            if value is not None and value < 1:
                raise InvalidInput(explain(f"--{name} is {value}", accepted="a positive number"))

    @property
    def window(self) -> Window:
        """How documents are cut where the store does not say it yet; raises InvalidInput for an impossible one."""
        return Window(DEFAULT_CONTEXT if self.context is None else self.context, self.stride)


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """Everything that `actstore encode` can be told."""

    store: Path
    saes: tuple[str, ...]
    neurons_top: int = 64
    sae_weights: bool = True
    activation_bits: int = 10
    sae_precision: str = "float32"
    encode_special: bool = False
    device: str = "auto"
    mixed: bool = False
    allow_unhealthy: bool = False
    allow_pt: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", Path(self.store).expanduser())
        if not self.saes:
            accepted = "[ID=]SOURCE[@SITE], such as a folder, neurons:mlp_act.5 or saelens:release/sae_id"
            raise InvalidInput(explain("No SAE was given to encode with", accepted=accepted))
        _check_firings(self.activation_bits, self.neurons_top, self.sae_precision)


def _check_firings(activation_bits: int, neurons_top: int, sae_precision: str) -> None:
    """Raise InvalidInput for numbers by which no firing can be stored."""
    if not 1 <= activation_bits <= MAX_ACTIVATION_BITS:
        raise InvalidInput(
            explain(f"--activation-bits {activation_bits} is out of range", accepted="1 to 23 (23 keeps all)")
        )
    if sae_precision not in SAE_PRECISIONS:
        raise InvalidInput(explain(f"--sae-precision is {sae_precision!r}", accepted=" or ".join(SAE_PRECISIONS)))
    if neurons_top < 1:
        raise InvalidInput(
            explain(
                f"--neurons-top is {neurons_top}",
                accepted="how many activations to keep of each row of --sae neurons:…, 1 or more",
            )
        )
