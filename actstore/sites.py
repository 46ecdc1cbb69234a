"""Sites: names of tensors inside a model, `kind.layer`, with one meaning on every architecture (docs/format.md §3)."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import InvalidInput, explain, unknown_name

__all__ = ["KINDS", "Site", "expand_sites", "parse_site"]

# The order in which a forward pass reaches the kinds of one layer; `Site` sorts by it.
KINDS: tuple[str, ...] = (
    "embed_raw",
    "resid_pre",
    "q",
    "k",
    "v",
    "pattern",
    "z",
    "attn_out_raw",
    "attn_out",
    "resid_mid",
    "ln2_normalized",
    "ln2",
    "mlp_act",
    "mlp_out_raw",
    "mlp_out",
    "resid_post",
    "final",
)
WITHOUT_LAYER = frozenset({"embed_raw", "final"})

_HOOKS = {  # TransformerLens names below `blocks.L.`
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "z",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_pattern": "pattern",
    "ln2.hook_normalized": "ln2_normalized",
    "mlp.hook_post": "mlp_act",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_NAME = re.compile(r"([a-z0-9_]+)(?:\.(\d+))?")


@dataclass(frozen=True)
class Site:
    """One tensor in the model, such as `resid_post.20`; `layer` is None for `embed_raw` and `final`."""

    kind: str
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("kind of site", self.kind, KINDS)
        if (self.layer is None) != (self.kind in WITHOUT_LAYER):
            wanted = f"{self.kind!r} alone" if self.kind in WITHOUT_LAYER else f"a layer, as in '{self.kind}.3'"
            raise InvalidInput(explain(f"The site {str(self)!r} is not complete", accepted=wanted))

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    @property
    def depth(self) -> tuple[int, int]:
        """Place in the forward pass: sites sort by it, and the deepest one ends the pass."""
        layer = -1 if self.kind == "embed_raw" else 1 << 30 if self.layer is None else self.layer
        return layer, KINDS.index(self.kind)


def parse_site(text: str) -> Site:
    """Return the site that a canonical or TransformerLens name means.

    Raises InvalidInput where the name is incomplete, UnknownName where its kind does not exist.
    """
    if block := _BLOCK.fullmatch(text):
        if block[2] not in _HOOKS:
            raise unknown_name("TransformerLens hook", block[2], _HOOKS)
        return Site(_HOOKS[block[2]], int(block[1]))
    name = _NAME.fullmatch(text)
    if not name:
        raise InvalidInput(
            explain(f"{text!r} is not the name of a site", accepted="kind.layer, as in 'resid_post.20' or 'z.5'")
        )
    return Site(name[1], None if name[2] is None else int(name[2]))


def expand_sites(patterns: Sequence[str], existing: Iterable[Site]) -> tuple[Site, ...]:
    """Return the sites that `patterns` name, in forward order, each once.

    A pattern is a name, `kind.*`, `kind.0-5` or `kind.5,10,20`; what it names must be among `existing`.
    Raises UnknownName, listing what exists, for a site that this model does not have.
    """
    available = sorted(existing, key=lambda site: site.depth)
    chosen: set[Site] = set()
    for pattern in patterns:
        chosen.update(_expand(pattern.strip(), available))
    return tuple(sorted(chosen, key=lambda site: site.depth))


def _expand(pattern: str, available: Sequence[Site]) -> list[Site]:
    kind, _, layers = pattern.partition(".")
    if "*" in pattern:
        found = [site for site in available if fnmatch.fnmatchcase(str(site), pattern)]
        if not found:
            raise _not_on_model(pattern, available)
        return found
    if kind in KINDS and re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", layers):
        wanted = [Site(kind, layer) for part in layers.split(",") for layer in _layers(part)]
    else:
        wanted = [parse_site(pattern)]
    for site in wanted:
        if site not in available:
            raise _not_on_model(str(site), available)
    return wanted


def _layers(part: str) -> range:
    first, _, last = part.partition("-")
    layers = range(int(first), int(last or first) + 1)
    if not layers:
        raise InvalidInput(explain(f"The layers {part!r} are none", accepted="first-last with first ≤ last, as in 0-5"))
    return layers


def _not_on_model(name: str, available: Sequence[Site]) -> Exception:
    spans: dict[str, list[int]] = {}
    for site in available:
        spans.setdefault(site.kind, []).extend([] if site.layer is None else [site.layer])
    shown = [f"{kind}.{min(ls)}-{max(ls)}" if ls else kind for kind, ls in spans.items()]
    return unknown_name("site", f"{name}", shown, next_step="choose one that this model has, e.g. 'resid_post.*'")
