"""What the name of a Gemma Scope SAE says: its site, width, sparsity, and the id that it gets in a store.

    RELEASE/layer_L/width_W/average_l0_N        RELEASE ends in -res, -att or -mlp

The id is Neuronpedia's, `L-gemmascope-res-W`, only for the SAE that Neuronpedia has under it: of Google's release and
canonical, i.e. with the average L0 nearest 100. Another sparsity of the same release is `L-gemmascope-res-W__l0-N`.
Any other release carries its own name: `gemma-scope-demo-res` gives `L-gemmascope-demo-res-W__l0-N`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from actstore.errors import UnsupportedFormat, explain
from actstore.sites import Site

__all__ = ["CANONICAL_L0", "SaeName", "fallback_id", "nearest_canonical", "read_name", "width_of_label"]

CANONICAL_L0 = 100  # the canonical SAE of a layer and width is the one whose average L0 is nearest

_SITES = {"res": "resid_post", "att": "z", "mlp": "mlp_out"}
_NAME = re.compile(
    r"(?:(?:.*/)?(?P<owner>[^/]+)/)?(?P<release>[^/]+)/layer_(?P<layer>\d+)/width_(?P<width>\d+[km]?)"
    r"/average_l0_(?P<l0>\d+)"
)
_WITH_L0 = re.compile(r"(?P<parent>.*)/average_l0_(?P<l0>\d+)")
_GOOGLE = re.compile(r"gemma-scope-(?P<model>(?:2b|9b|27b)-(?:pt|it))-(?P<kind>res|att|mlp)")
_NEURONPEDIA_MODELS = {"2b-pt": "gemma-2-2b", "9b-pt": "gemma-2-9b", "9b-it": "gemma-2-9b-it", "27b-pt": "gemma-2-27b"}
# The canonical L0 of the SAEs known by heart, for paths that name a number; a listing of the release knows the others.
_KNOWN_CANONICAL: dict[tuple[str, str], dict[int, int]] = {
    ("gemma-scope-2b-pt-res", "16k"): {0: 105, 5: 68, 10: 77, 12: 82, 19: 73, 20: 71, 25: 116},
    ("gemma-scope-2b-pt-att", "16k"): {12: 85},
    ("gemma-scope-2b-pt-mlp", "16k"): {12: 108},
    ("gemma-scope-9b-pt-res", "16k"): {20: 68},
    ("gemma-scope-9b-pt-res", "131k"): {20: 114},
    ("gemma-scope-9b-it-res", "16k"): {9: 88, 20: 91, 31: 76},
    ("gemma-scope-9b-it-res", "131k"): {9: 121, 20: 81, 31: 109},
    ("gemma-scope-27b-pt-res", "131k"): {10: 106, 22: 82, 34: 72},
}


@dataclass(frozen=True)
class SaeName:
    """What a folder's path says about the SAE in it."""

    owner: str | None
    release: str
    layer: int
    width_label: str  # "16k"
    l0: int  # measured by its makers, rounded
    canonical: bool  # known to be the one nearest 100 in its release

    @property
    def site(self) -> Site | None:
        """The site that the release reads; None where its name does not say one."""
        kind = self.release.rpartition("-")[2]
        return Site(_SITES[kind], self.layer) if kind in _SITES else None

    @property
    def inner_path(self) -> str:
        """The folder inside the release."""
        return f"layer_{self.layer}/width_{self.width_label}/average_l0_{self.l0}"

    @property
    def id(self) -> str:
        """The id in a store."""
        google = self._google
        slug = f"gemmascope-{google['kind']}" if google else slug_of(self.release.replace("gemma-scope", "gemmascope"))
        plain = f"{self.layer}-{slug}-{self.width_label}"
        return plain if google and self.canonical else f"{plain}__l0-{self.l0}"

    @property
    def neuronpedia_id(self) -> str | None:
        """`model/source` on Neuronpedia; None for what it does not have."""
        google = self._google
        model = _NEURONPEDIA_MODELS.get(google["model"]) if google else None
        return f"{model}/{self.id}" if model and self.canonical else None

    @property
    def _google(self) -> re.Match[str] | None:
        return _GOOGLE.fullmatch(self.release) if self.owner == "google" else None


def read_name(path: str, *, canonical: bool = False) -> SaeName | None:
    """Return what the path of an SAE's folder says, or None where it is not named like Gemma Scope's.

    canonical: a complete listing of the release has shown this SAE to be nearest 100.
    Raises UnsupportedFormat for a release of transcoders.
    """
    match = _NAME.fullmatch(path)
    if not match:
        return None
    release, layer, l0 = match["release"], int(match["layer"]), int(match["l0"])
    if release.endswith("transcoders"):
        raise UnsupportedFormat(
            explain(
                f"{path} is a transcoder; transcoders are not read yet", accepted="releases ending in -res, -att, -mlp"
            )
        )
    known = _KNOWN_CANONICAL.get((release, match["width"]), {}).get(layer) == l0
    return SaeName(match["owner"], release, layer, match["width"], l0, canonical or known)


def width_of_label(label: str) -> int:
    """Return the number of features that a width's label means: "16k" is 16,384, "1m" is 1,048,576, "48" is 48."""
    factor = {"k": 1 << 10, "m": 1 << 20}.get(label[-1], 1)
    return int(label.rstrip("km")) * factor


def nearest_canonical(folders: Iterable[str]) -> list[str]:
    """Return, of the folders `…/average_l0_N` in each parent, the one with N nearest 100 (the smaller of two)."""
    nearest: dict[str, tuple[int, int, str]] = {}
    for folder in folders:
        if match := _WITH_L0.fullmatch(folder):
            l0 = int(match["l0"])
            candidate = (abs(l0 - CANONICAL_L0), l0, folder)
            nearest[match["parent"]] = min(candidate, nearest.get(match["parent"], candidate))
    return [folder for _, _, folder in nearest.values()]


def fallback_id(site: Site, folder: str) -> str:
    """Return the id of an SAE whose path says nothing: its site and its folder's own name."""
    return f"{site}-{slug_of(folder.rpartition('/')[2])}"[:128]


def slug_of(text: str) -> str:
    """Return `text` with everything that an id cannot hold made a hyphen."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
