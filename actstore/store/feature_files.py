"""What a store says of features beside their firings: logits, made once, and labels (docs/format.md §6)."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from .bundle import decode_bundle
from .layout import PassFile
from .location import Location
from .proved import read_file

__all__ = ["Logits", "read_feature_logits", "read_labels"]

Logits = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def read_feature_logits(location: Location, made: PassFile, sae: str) -> Logits | None:
    """Return token ids and logits (feature, rank) of an SAE of a pass, or None where they were not computed."""
    name = f"firings/{sae}/feature_logits.zip"
    if name not in made.files:
        return None
    arrays, _ = decode_bundle(read_file(location, name, {name: {"sha256": made.files[name].sha256}}), name)
    return arrays["token_ids"], arrays["logits"]


def read_labels(location: Location) -> list[tuple[str, int, str]]:
    """Return sae, feature and label of every feature that was named."""
    if not location.exists("labels.json"):
        return []
    body = location.read_sealed("labels.json")["labels"]
    return [(sae, int(feature), label) for sae, of in body.items() for feature, label in of.items()]
