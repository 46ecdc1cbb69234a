"""What the name of a Gemma Scope SAE says: its site, width, sparsity, and the id that it gets in a store.

    RELEASE/layer_L/width_W/average_l0_N        RELEASE ends in -res, -att, -mlp or -transcoders
    RELEASE/embedding/width_W/average_l0_N      RELEASE ends in -res

The id is Neuronpedia's, `L-gemmascope-res-W`, only for the SAE that Neuronpedia has under it: of Google's release and
canonical, i.e. with the average L0 nearest 100; of transcoders, of which it took others, those that are known by heart.
Another sparsity of the same release is `L-gemmascope-res-W__l0-N`.
Any other release carries its own name: `gemma-scope-demo-res` gives `L-gemmascope-demo-res-W__l0-N`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from actstore.sites import Site

from .neuronpedia import neuronpedia_id_of

__all__ = ["CANONICAL_L0", "SaeName", "fallback_id", "nearest_canonical", "read_name", "width_of_label"]

CANONICAL_L0 = 100  # the canonical SAE of a layer and width is the one whose average L0 is nearest

_SITES = {"res": "resid_post", "att": "z", "mlp": "mlp_out", "transcoders": "ln2_normalized"}
_WRITE_SITES = {"transcoders": "mlp_out"}
_SLUGS = {"transcoders": "transcoder"}  # where Neuronpedia's word is another
_NAME = re.compile(
    r"(?:(?:.*/)?(?P<owner>[^/]+)/)?(?P<release>[^/]+)/(?:layer_(?P<layer>\d+)|embedding)/width_(?P<width>\d+[km]?)"
    r"/average_l0_(?P<l0>\d+)"
)
_WITH_L0 = re.compile(r"(?P<parent>.*)/average_l0_(?P<l0>\d+)")
_GOOGLE = re.compile(r"gemma-scope-(?P<model>(?:2b|9b|27b)-(?:pt|it))-(?P<kind>res|att|mlp|transcoders)")
_NEURONPEDIA_MODELS = {"2b-pt": "gemma-2-2b", "9b-pt": "gemma-2-9b", "9b-it": "gemma-2-9b-it", "27b-pt": "gemma-2-27b"}


@dataclass(frozen=True)
class SaeName:
    """What a folder's path says about the SAE in it."""

    owner: str | None
    release: str
    layer: int | None  # None: the embedding
    width_label: str  # "16k"
    l0: int  # measured by its makers, rounded
    canonical: bool  # a listing has shown that it is the one nearest 100 in its release

    @property
    def site(self) -> Site | None:
        """The site that the release reads; None where its name does not say one."""
        if self.layer is None:
            return Site("embed_raw") if self._kind == "res" else None
        return Site(_SITES[self._kind], self.layer) if self._kind in _SITES else None

    @property
    def write_site(self) -> Site | None:
        """The site that a release of transcoders writes."""
        return Site(_WRITE_SITES[self._kind], self.layer) if self._kind in _WRITE_SITES else None

    @property
    def inner_path(self) -> str:
        """The folder inside the release."""
        where = "embedding" if self.layer is None else f"layer_{self.layer}"
        return f"{where}/width_{self.width_label}/average_l0_{self.l0}"

    @property
    def id(self) -> str:
        """The id in a store."""
        kind = _SLUGS.get(self._kind, self._kind)
        slug = f"gemmascope-{kind}" if self._google else slug_of(self.release.replace("gemma-scope", "gemmascope"))
        plain = f"{'embedding' if self.layer is None else self.layer}-{slug}-{self.width_label}"
        return plain if self._is_neuronpedias else f"{plain}__l0-{self.l0}"

    @property
    def neuronpedia_id(self) -> str | None:
        """`model/source` on Neuronpedia; None for what it does not have."""
        google = self._google
        model = _NEURONPEDIA_MODELS.get(google["model"]) if google else None
        return f"{model}/{self.id}" if model and self._is_neuronpedias else None

    @property
    def _kind(self) -> str:
        return self.release.rpartition("-")[2]

    @property
    def _is_neuronpedias(self) -> bool:
        """Whether Neuronpedia has this very one under the id without an L0."""
        if not self._google or self.layer is None:
            return False
        if neuronpedia_id_of(f"{self.owner}/{self.release}/{self.inner_path}"):
            return True
        return self.canonical and self._kind not in _WRITE_SITES

    @property
    def _google(self) -> re.Match[str] | None:
        return _GOOGLE.fullmatch(self.release) if self.owner == "google" else None


def read_name(path: str, *, canonical: bool = False) -> SaeName | None:
    """Return what the path of an SAE's folder says, or None where it is not named like Gemma Scope's.

    canonical: a complete listing of the release has shown this SAE to be nearest 100.
    """
    match = _NAME.fullmatch(path)
    if not match:
        return None
    release, l0 = match["release"], int(match["l0"])
    layer = int(match["layer"]) if match["layer"] else None
    return SaeName(match["owner"], release, layer, match["width"], l0, canonical)


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
