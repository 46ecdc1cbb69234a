"""A model in memory: what its sites hold during a forward pass, and the weights that lenses need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actstore.errors import Unhealthy, explain
from actstore.recipe import ModelIdentity
from actstore.sites import Site, not_on_model

from .facts import ModelFacts, sites_of
from .families import Family, Tap
from .placement import main_device, resident, spread_of
from .transforms import TRANSFORMS
from .unembedding import Unembedding

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

__all__ = ["Deposit", "LoadedModel"]

Deposit = Callable[[Site, "torch.Tensor"], None]


class _AllCaptured(Exception):
    """Raised inside the forward pass when no site is left to wait for; never leaves this module."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in evaluation mode with eager attention, on one device or spread over several.

    Made by `load_model`. Everything that it takes and returns is on `device`; weights that it returns are its own, not
    copies, unless they lie elsewhere.
    """

    facts: ModelFacts
    identity: ModelIdentity
    family: Family
    causal_lm: PreTrainedModel
    _taps: dict[Site, Tap] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        existing = sites_of(self.family, self.facts)
        object.__setattr__(self, "_taps", {site: self.family.taps[site.kind] for site in existing})

    @property
    def device(self) -> torch.device:
        """The device of token ids, captured values and weights; of a model that is spread, that of its embedding."""
        return main_device(self.causal_lm)

    @property
    def spread(self) -> tuple[str, ...] | None:
        """Where the parts of the model lie, first to last; None where all are on one device."""
        return spread_of(self.causal_lm)

    @property
    def dtype(self) -> str:
        """The compute dtype's name: "float32" or "bfloat16"."""
        return str(self.causal_lm.dtype).removeprefix("torch.")

    def sites(self) -> tuple[Site, ...]:
        """Return every site of the model, in forward order."""
        return tuple(self._taps)

    def site_width(self, site: Site) -> int:
        """Return a site's width; of a pattern, its columns for each key: the heads.

        Raises UnknownName where this model does not have it.
        """
        return self.facts.width(self._tap(site))

    def capture(
        self,
        token_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        sites: Iterable[Site],
        deposit: Deposit,
        *,
        stop: bool = True,
    ) -> None:
        """Run the model over a batch and hand each site's values to `deposit`, once, during the pass.

        token_ids and attention_mask: int64 (batch, position) on the model's device, padded on the right.
        `deposit(site, values)` gets (batch, position, width) in the compute dtype, of `pattern` (batch, head, query
        position, key position); padded positions hold garbage. The tensor is the model's own, valid after the call but
        as large as the batch: copy out of it what is kept.
        With `stop` the pass ends behind the deepest site. Raises UnknownName for a site that the model does not have.
        """
        import torch

        taps = {site: self._tap(site) for site in sites}
        waiting, device = set(taps), self.device

        def receive(site: Site, values: torch.Tensor) -> None:
            assert site in waiting, f"the module of {site} ran twice in one pass"
            deposit(site, values.to(device))
            waiting.remove(site)
            if stop and not waiting:
                raise _AllCaptured

        with torch.no_grad(), self._hooked(taps, receive), suppress(_AllCaptured):
            self._run(token_ids, attention_mask)
        if waiting:
            raise _never_ran(sorted(waiting, key=lambda site: site.depth))

    def unembedding(self) -> Unembedding:
        """Return final norm, unembedding and soft cap."""
        return Unembedding(
            gain=self._gain(self.family.final_norm),
            weight=self._fetched(self.causal_lm.get_output_embeddings(), "weight"),
            softcap=self.facts.final_softcap,
            norm_eps=self.facts.norm_eps,
            norm=self.family.norm,
            bias=self._bias(self.family.final_norm),
        )

    def attention_output(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a layer's W_O (heads · d_head, d_model), and the gain (d_model) of the norm behind it.

        z @ W_O is `attn_out_raw`, less the projection's bias where the architecture has one (see `projection`). W_O is
        in the model's dtype, its rows head after head; the gain is float32, or None where the architecture has no norm
        between `attn_out_raw` and `attn_out`. Raises UnknownName for a layer not there.
        """
        self._tap(Site("z", layer))
        post_norm = self.family.attention_post_norm
        gain = None if post_norm is None else self._gain(post_norm.format(layer=layer))
        return self.projection(self.family.attention_output, layer)[0], gain

    def projection(self, module: str, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight (in, out) in the model's dtype and bias float32 (out) of a layer's linear module.

        module: `attention_output` or `mlp_output` of the family.
        """
        path = module.format(layer=layer)
        weight = self._weight(path)
        return weight if self.family.weights_are_inputs_first else weight.T, self._bias(path)

    def embedded(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return float32 `resid_pre.0` of `embed_raw` rows (row, d_model) at positions int64 (row)."""
        scaled = rows.float() * (self.facts.d_model**0.5 if self.family.embedding_is_scaled else 1)
        if self.family.position_embedding is None:
            return scaled
        return scaled + self._weight(self.family.position_embedding)[positions].float()

    def norm(self, module: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return gain and bias of a norm by its path, float32 (d_model)."""
        return self._gain(module), self._bias(module)

    def _tap(self, site: Site) -> Tap:
        if site not in self._taps:
            raise not_on_model(site, self.sites())
        return self._taps[site]

    def _run(self, token_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Run the model without its head: nothing here needs a (batch, position, vocabulary) tensor."""
        import torch

        positions = torch.arange(token_ids.shape[1], device=token_ids.device).expand(token_ids.shape)
        self.causal_lm.base_model(
            input_ids=token_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        )

    @contextmanager
    def _hooked(self, taps: dict[Site, Tap], receive: Deposit) -> Iterator[None]:
        with ExitStack() as hooks:
            for site, tap in taps.items():
                module = self.causal_lm.get_submodule(tap.module.format(layer=site.layer))
                hooks.callback(_hook(module, tap, self._receiver(site, tap, receive)).remove)
            yield

    def _receiver(self, site: Site, tap: Tap, receive: Deposit) -> Callable[[torch.Tensor], None]:
        if tap.transform is None:
            return lambda values: receive(site, values)
        transform = TRANSFORMS[tap.transform]
        return lambda values: receive(site, transform(values, self.facts))

    def _weight(self, module: str) -> torch.Tensor:
        return self._fetched(self.causal_lm.get_submodule(module), "weight")

    def _bias(self, module: str) -> torch.Tensor | None:
        part = self.causal_lm.get_submodule(module)
        return None if getattr(part, "bias", None) is None else self._fetched(part, "bias").float()

    def _fetched(self, module: torch.nn.Module, name: str) -> torch.Tensor:
        with resident(module):
            weight: torch.Tensor = module.get_parameter(name)
            return weight.detach().to(self.device)

    def _gain(self, module: str) -> torch.Tensor:
        return self._weight(module).float() + self.family.norm_gain_offset


def _hook(module: torch.nn.Module, tap: Tap, receive: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Hook one end of a module; the hooks return None, so that they change nothing."""

    def before(_module: Any, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        receive(positional[0] if positional else keywords[tap.keyword])

    def after(_module: Any, _inputs: Any, output: Any) -> None:
        receive(output[tap.element] if isinstance(output, tuple) else output)

    def rows(module: Any, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        token_ids = positional[0] if positional else keywords[tap.keyword]
        with resident(module):
            values = module.weight[token_ids.to(module.weight.device)]
        receive(values)

    if tap.end == "rows":
        return module.register_forward_pre_hook(rows, with_kwargs=True)
    if tap.end == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _never_ran(sites: Sequence[Site]) -> Unhealthy:
    return Unhealthy(
        explain(
            f"The forward pass ended without reaching {', '.join(map(str, sites))}",
            next_step="report the model's architecture: its description does not fit this version of transformers",
        )
    )
