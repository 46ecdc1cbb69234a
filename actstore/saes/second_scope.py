"""What the name of a Gemma Scope 2 SAE says: the id that it gets in a store.

    google/gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium        13-gemmascope-2-res-16k
    google/gemma-scope-2-1b-pt/resid_post_all/layer_13_width_16k_l0_small     13-gemmascope-2-res-16k__all-l0-small

The first id is Neuronpedia's, for the SAE that it has under it; any other SAE of Google's carries what tells it apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .neuronpedia import neuronpedia_id_of

__all__ = ["SecondName", "read_second_name"]

_KINDS = {"resid_post": "res", "attn_out": "att", "mlp_out": "mlp", "transcoder": "transcoder"}
_NAME = re.compile(
    rf"(?:.*/)?(?P<folder>google/gemma-scope-2-[^/]+/(?P<kind>{'|'.join(_KINDS)})(?P<all>_all)?"
    r"/layer_(?P<layer>\d+)_width_(?P<width>\d+[km])_(?P<rest>l0_[a-z0-9_]+))"
)


@dataclass(frozen=True)
class SecondName:
    """The id in a store, and `model/source` where Neuronpedia has it."""

    id: str
    neuronpedia_id: str | None


def read_second_name(path: str) -> SecondName | None:
    """Return what the path of an SAE's folder says, or None where it is not named like Google's Gemma Scope 2."""
    match = _NAME.fullmatch(path)
    if not match:
        return None
    source = neuronpedia_id_of(match["folder"])
    plain = f"{match['layer']}-gemmascope-2-{_KINDS[match['kind']]}-{match['width']}"
    rest = ("all-" if match["all"] else "") + match["rest"].replace("_", "-")
    return SecondName(plain if source else f"{plain}__{rest}", source)
