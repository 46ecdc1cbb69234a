"""From the name of a hook, as SAEs' configurations and folders write it, to a site."""

from __future__ import annotations

import re

from actstore.errors import ActstoreError
from actstore.sites import Site, parse_site

__all__ = ["sites_of_hooks"]

_LAYER = re.compile(
    r"(?:model\.|language_model\.|transformer\.|gpt_neox\.)*(?:layers|h)\.(?P<layer>\d+)"
    r"(?:\.(?P<module>[a-z_.0-9]+?))??(?:\.(?P<side>input|output))?"
)
# (module below the layer, input or output) → kind. Norms that stand for other things on other models are left out.
_KINDS = {
    (None, "input"): "resid_pre",
    (None, "output"): "resid_post",
    ("self_attn.o_proj", "input"): "z",
    ("attn.c_proj", "input"): "z",
    ("attention.dense", "input"): "z",
    ("post_feedforward_layernorm", "output"): "mlp_out",
    ("pre_feedforward_layernorm", "input"): "resid_mid",
    ("pre_feedforward_layernorm", "output"): "ln2",
    ("self_attn", "output"): "attn_out_raw",
    ("attn", "output"): "attn_out_raw",
    ("attention", "output"): "attn_out_raw",
    ("mlp", "output"): "mlp_out_raw",
    ("mlp.down_proj", "input"): "mlp_act",
}


def sites_of_hooks(*names: str) -> tuple[Site, ...]:
    """Return the different sites that some names of one hook mean; those that mean none are left out."""
    return tuple(dict.fromkeys(site for name in names if name and (site := _site_of_hook(name))))


def _site_of_hook(name: str) -> Site | None:
    """Return the site of a TransformerLens hook or a Hugging Face module, its output unless it says `.input`.

    `layers.5` is resid_post.5, `model.layers.5.self_attn.o_proj.input` is z.5, `layers.5.mlp` is mlp_out_raw.5: the
    module's own output, before any post-norm. None for another name, and for one that is not one tensor on all models.
    """
    if found := _LAYER.fullmatch(name):
        kind = _KINDS.get((found["module"], found["side"] or "output"))
        return Site(kind, int(found["layer"])) if kind else None
    try:
        return parse_site(name)
    except ActstoreError:
        return None
