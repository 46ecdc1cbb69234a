"""Gemma Scope 2's coders of several layers: cross-layer transcoders and crosscoders, a file for each layer.

    RELEASE/clt/width_W_l0_S[_affine]/params_layer_L.safetensors
    RELEASE/crosscoder/layer_A_B_C_D_width_W_l0_S/params_layer_N.safetensors        N counts the layers A, B, …

There is no configuration: all that is known stands in the path. W counts the features of all layers together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from actstore.sites import Site

from .config import Config
from .declaration import Declaration
from .names import slug_of

__all__ = ["LayerName", "declare_layer", "read_layer_name"]

_NAME = re.compile(
    r"(?:(?:.*/)?(?P<owner>[^/]+)/)?(?P<release>[^/]+)/"
    r"(?P<kind>clt|crosscoder)/(?P<folder>(?:layer_(?P<layers>\d+(?:_\d+)*)_)?width_[^/]+)"
    r"/params_layer_(?P<number>\d+)\.safetensors"
)
_GOOGLE = re.compile(r"gemma-scope-2-.*")
_TENSORS = {name: name for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")}


@dataclass(frozen=True)
class LayerName:
    """What the path of one layer's file says."""

    owner: str
    release: str
    kind: str  # "clt" or "crosscoder"
    folder: str
    number: int  # in the file's name: its place among the layers of the coder
    layers: tuple[int, ...]  # of the model; empty for all of them

    @property
    def layer(self) -> int:
        """The layer of the model."""
        return self.layers[self.number] if self.layers else self.number

    @property
    def inner_path(self) -> str:
        """The file inside the release, without its ending."""
        return f"{self.kind}/{self.folder}/params_layer_{self.number}"

    @property
    def id(self) -> str:
        """The id in a store."""
        is_google = self.owner == "google" and _GOOGLE.fullmatch(self.release)
        release = "gemmascope-2" if is_google else slug_of(self.release.replace("gemma-scope", "gemmascope"))
        return f"{self.layer}-{release}-{self.kind}-{slug_of(self.folder)}"

    @property
    def neuronpedia_id(self) -> None:
        """Neuronpedia's id, which is not known of any."""
        return None


def read_layer_name(path: str) -> LayerName | None:
    """Return what the path of weights says, or None where it is not one layer of such a coder."""
    found = _NAME.fullmatch(path)
    if not found or (found["kind"] == "crosscoder") != bool(found["layers"]):
        return None
    layers = tuple(map(int, found["layers"].split("_"))) if found["layers"] else ()
    number = int(found["number"])
    if layers and number >= len(layers):
        return None
    return LayerName(found["owner"] or "", found["release"], found["kind"], found["folder"], number, layers)


def declare_layer(config: Config, path: str) -> Declaration:
    """Return what one layer is: a CLT reads and writes as a transcoder, a crosscoder is read from the residual stream.

    A path that does not say which coder and layer it is of is a fault.
    """
    name = read_layer_name(path)
    if name is None:
        config.faults.append(
            "which layer of which coder it is stands in its path and nowhere else: keep the file in clt/width_… or "
            "crosscoder/layer_A_B_width_…, numbered by layer or by A, B, …"
        )
        name = LayerName("", "", "clt", "", 0, ())
    is_clt, has_skip = name.kind == "clt", "_affine" in name.folder
    among = f" of {'_'.join(map(str, name.layers))}" if name.layers else ""
    return Declaration(
        f"jumprelu {name.kind} layer={name.layer}{among}" + (" skip" if has_skip else ""),
        _TENSORS | ({"w_skip": "affine_skip_connection"} if has_skip else {}),
        "safetensors w_enc (d_in, d_sae), w_dec (d_sae, layer, d_out), b_enc, b_dec, threshold; affine_skip_connection "
        "(d_in, d_out) in a folder with _affine in its name",
        sites=(Site("ln2" if is_clt else "resid_post", name.layer),),
        transcodes=is_clt,
        write_sites=(Site("mlp_out", name.layer),) if is_clt else (),
        position=name.number,
        n_layers=len(name.layers) or None,
    )
