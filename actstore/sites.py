"""Sites: names of tensors inside a model, `kind.layer`, with one meaning on every architecture (docs/format.md §3)."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .errors import InvalidInput, UnknownName, explain, unknown_name

__all__ = ["KINDS", "Missing", "Site", "expand_sites", "not_on_model", "not_stored", "parse_site"]

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

_HOOKS = {  # TransformerLens names below `blocks.L.`: those of all versions, then those of the bridge in 3.x
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_in": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "z",
    "attn.hook_v": "v",
    "attn.hook_pattern": "pattern",
    "ln2.hook_normalized": "ln2_normalized",
    "mlp.hook_post": "mlp_act",
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    "attn.o.hook_in": "z",
    "mlp.hook_in": "ln2",
    "mlp.out.hook_in": "mlp_act",
}
_POINTS = {  # interp-engine names behind `ie:`; there `*_out` is the module's own output, `*_out_post` what is added
    "resid_pre": "resid_pre",
    "q_norm_out": "q",
    "k_norm_out": "k",
    "value": "v",
    "attn_probs": "pattern",
    "z": "z",
    "attn_out": "attn_out_raw",
    "attn_out_post": "attn_out",
    "resid_mid": "resid_mid",
    "mlp_in": "ln2",
    "mlp_act": "mlp_act",
    "mlp_out": "mlp_out_raw",
    "mlp_out_post": "mlp_out",
    "resid_post": "resid_post",
    "final_norm": "final",
}
_MODULES = {  # ends of Hugging Face modules, by their path below a layer; no name in it means two things
    "input": "resid_pre",
    "output": "resid_post",
    "self_attn.q_norm.output": "q",
    "self_attn.k_norm.output": "k",
    "self_attn.v_proj.output": "v",
    "self_attn.o_proj.input": "z",
    "self_attn.o_proj.output": "attn_out_raw",
    "self_attn.output": "attn_out_raw",
    "pre_feedforward_layernorm.input": "resid_mid",
    "pre_feedforward_layernorm.output": "ln2",
    "mlp.down_proj.input": "mlp_act",
    "mlp.down_proj.output": "mlp_out_raw",
    "mlp.output": "mlp_out_raw",
    "post_feedforward_layernorm.input": "mlp_out_raw",
    "post_feedforward_layernorm.output": "mlp_out",
    "attn.c_proj.input": "z",
    "attn.c_proj.output": "attn_out_raw",
    "attn.output": "attn_out_raw",
    "ln_2.input": "resid_mid",
    "ln_2.output": "ln2",
    "mlp.c_proj.input": "mlp_act",
    "mlp.c_proj.output": "mlp_out_raw",
    "attention.dense.input": "z",
    "attention.dense.output": "attn_out_raw",
    "attention.output": "attn_out_raw",
    "mlp.dense_4h_to_h.input": "mlp_act",
    "mlp.dense_4h_to_h.output": "mlp_out_raw",
}
_AMBIGUOUS = {  # names of TransformerLens and Hugging Face that are another site on another architecture
    "attn.hook_out": ("attn_out_raw", "attn_out"),
    "mlp.hook_out": ("mlp_out_raw", "mlp_out"),
    "post_attention_layernorm.input": ("resid_mid", "attn_out_raw"),
    "post_attention_layernorm.output": ("ln2", "attn_out"),
    "attn.hook_q": ("q",),  # before the norm of queries, where there is one: then no site
    "attn.hook_k": ("k",),
}
_WITHOUT_LAYER_ALIASES = {
    "unembed.hook_in": "final",
    "model.norm.output": "final",
    "model.language_model.norm.output": "final",
    "transformer.ln_f.output": "final",
    "gpt_neox.final_layer_norm.output": "final",
    "ie:final_norm": "final",
}
_MISSING_BECAUSE = {
    "resid_mid": "attention and MLP of a parallel block both read resid_pre",
    "ln2": "no norm stands before this model's MLP: it reads resid_mid",
    "ln2_normalized": "no norm stands before this model's MLP: it reads resid_mid",
}
_BLOCK = re.compile(r"blocks\.(\d{1,6})\.(.+)")
_MODULE = re.compile(
    r"(?:(?:language_)?model\.(?:language_model\.|model\.)?layers|transformer\.h|gpt_neox\.layers)\.(\d{1,6})\.(.+)"
)
_POINT = re.compile(r"ie:([a-z0-9_]+)\.(\d{1,6})")
_NAME = re.compile(r"([a-z0-9_]+)(?:\.(\d{1,6}))?")


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


Missing = Callable[[Site | str, Iterable[Site]], UnknownName]
"""What makes the error for a site or pattern that is not there, from the sites that are."""


def parse_site(text: str) -> Site:
    """Return the site that a name means: a canonical one, or another library's.

    Others are TransformerLens hooks (`blocks.5.hook_resid_post`), an end of a Hugging Face module
    (`model.layers.5.self_attn.o_proj.input`), and interp-engine points with the prefix `ie:` (`ie:attn_out.5`).
    Raises InvalidInput where the name is incomplete or means different sites on different architectures, UnknownName
    where its kind does not exist.
    """
    if text in _WITHOUT_LAYER_ALIASES:
        return Site(_WITHOUT_LAYER_ALIASES[text])
    for spelling, kinds, what in (
        (_BLOCK, _HOOKS, "TransformerLens hook"),
        (_MODULE, _MODULES, "end of a Hugging Face module"),
    ):
        if found := spelling.fullmatch(text):
            return _aliased(text, found[2], int(found[1]), kinds, what)
    if point := _POINT.fullmatch(text):
        return _aliased(text, point[1], int(point[2]), _POINTS, "interp-engine point")
    name = _NAME.fullmatch(text)
    if not name:
        raise InvalidInput(
            explain(f"{text!r} is not the name of a site", accepted="kind.layer, as in 'resid_post.20' or 'z.5'")
        )
    return Site(name[1], None if name[2] is None else int(name[2]))


def _aliased(text: str, name: str, layer: int, kinds: Mapping[str, str], what: str) -> Site:
    if name in _AMBIGUOUS:
        raise InvalidInput(
            explain(
                f"{text!r} is another tensor on another architecture",
                accepted=" or ".join(f"'{kind}.{layer}'" for kind in _AMBIGUOUS[name]),
                next_step="choose the one that is meant",
            )
        )
    if name not in kinds:
        raise unknown_name(what, name, kinds)
    return Site(kinds[name], layer)


def not_on_model(wanted: Site | str, available: Iterable[Site]) -> UnknownName:
    """Return the error for a site or pattern that a model does not have: what it has, and why this one is missing."""
    spans: dict[str, list[int]] = {}
    for site in available:
        spans.setdefault(site.kind, []).extend([] if site.layer is None else [site.layer])
    shown = [f"{kind}.{min(ls)}-{max(ls)}" if ls else kind for kind, ls in spans.items()]
    kind = wanted.kind if isinstance(wanted, Site) else wanted.partition(".")[0]
    why = _MISSING_BECAUSE[kind] + "; " if kind in _MISSING_BECAUSE and kind not in spans else ""
    next_step = f"{why}choose one that this model has, e.g. 'resid_post.*'"
    return unknown_name("site", str(wanted), shown, next_step=next_step)


def not_stored(wanted: Site | str, available: Iterable[Site]) -> UnknownName:
    """Return the error for a site or pattern that a store does not have: what it has, and how to add this one."""
    next_step = f"store it first: actstore extract MODEL --into STORE --site '{wanted}'"
    return unknown_name("stored site", str(wanted), map(str, available), next_step=next_step)


def expand_sites(
    patterns: Sequence[str], existing: Iterable[Site], missing: Missing = not_on_model
) -> tuple[Site, ...]:
    """Return the sites that `patterns` name, in forward order, each once.

    A pattern is a name, `kind.*`, `kind.0-5` or `kind.5,10,20`; what it names must be among `existing`.
    Raises what `missing` says for one that is not: an UnknownName that lists what exists, on this model by default.
    """
    available = sorted(existing, key=lambda site: site.depth)
    chosen: set[Site] = set()
    for pattern in patterns:
        chosen.update(_expand(pattern.strip(), available, missing))
    return tuple(sorted(chosen, key=lambda site: site.depth))


def _expand(pattern: str, available: Sequence[Site], missing: Missing) -> list[Site]:
    kind, _, layers = pattern.partition(".")
    if "*" in pattern:
        found = [site for site in available if fnmatch.fnmatchcase(str(site), pattern)]
        if not found:
            raise missing(pattern, available)
        return found
    if kind in KINDS and re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", layers):
        wanted = [Site(kind, layer) for part in layers.split(",") for layer in _layers(part)]
    else:
        wanted = [parse_site(pattern)]
    for site in wanted:
        if site not in available:
            raise missing(site, available)
    return wanted


def _layers(part: str) -> range:
    first, _, last = part.partition("-")
    layers = range(int(first), int(last or first) + 1)
    if not layers:
        raise InvalidInput(explain(f"The layers {part!r} are none", accepted="first-last with first ≤ last, as in 0-5"))
    return layers
