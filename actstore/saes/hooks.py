"""From the name of a hook, as SAEs' configurations and folders write it, to a site."""

from __future__ import annotations

import re

from actstore.errors import ActstoreError
from actstore.sites import Site, parse_site

__all__ = ["sites_of_hooks"]

# A module of any architecture, with or without the names above its layers, and its input or output where it is said.
_MODULE = re.compile(
    r"(?:model\.|language_model\.|transformer\.|gpt_neox\.)*(?:layers|h)\.(?P<layer>\d+)"
    r"(?P<module>(?:\.[a-z_0-9]+)*?)(?P<side>\.input|\.output)?"
)


def sites_of_hooks(*names: str) -> tuple[Site, ...]:
    """Return the different sites that some names of one hook mean; those that mean none are left out."""
    return tuple(dict.fromkeys(site for name in names if name and (site := _site_of_hook(name))))


def _site_of_hook(name: str) -> Site | None:
    """Return the site of a TransformerLens hook or a Hugging Face module, its output unless it says `.input`.

    `layers.5` is resid_post.5, `model.layers.5.self_attn.o_proj.input` is z.5, `layers.5.mlp` is mlp_out_raw.5: the
    module's own output, before any post-norm. None for another name, and for one that is not one tensor on all models.
    """
    if found := _MODULE.fullmatch(name):
        name = f"model.layers.{found['layer']}{found['module']}{found['side'] or '.output'}"
    try:
        return parse_site(name)
    except ActstoreError:
        return None
