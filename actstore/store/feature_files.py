"""What a store says of features beside their firings: logits, made once, and labels (docs/format.md §6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from .bundle import decode_bundle
from .layout import PassFile
from .location import Location
from .proved import read_file
from .shapes import FeatureNumber, read_as, refusing

__all__ = ["LABELS_FILE", "Logits", "labels_of", "read_feature_logits", "read_labels"]

LABELS_FILE = "labels.json"

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
    if not location.exists(LABELS_FILE):
        return []
    labels = labels_of(location.read_sealed(LABELS_FILE), f"{location.url}/{LABELS_FILE}")
    return [(sae, int(feature), label) for sae, of in labels.items() for feature, label in of.items()]


def labels_of(body: Mapping[str, Any], name: str) -> Mapping[str, Mapping[str, str]]:
    """Return what a `labels.json` says: SAE → feature → label; raises CorruptStore where it cannot be so."""
    with refusing(name):
        labels: Mapping[str, Mapping[str, str]] = read_as(_LABELS, body.get("labels"), "labels")
    return labels


_LABELS = Mapping[str, Mapping[FeatureNumber, str]]
