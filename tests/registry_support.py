"""What names of SAEs stand for, where the hub has nothing."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from actstore.saes import expand_sae_arguments


def empty_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The hub is an empty cache, and asking it for anything fails."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def named(*names: str) -> list[tuple[str, str, str | None]]:
    """Return id, folder and Neuronpedia's id of what names stand for."""
    return [(sae.sae, sae.place.folder, sae.neuronpedia_id) for sae in expand_sae_arguments(names)]
