"""From what the user wrote to a local folder: a path as it is, a hub id through the hub's cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from actstore.errors import InvalidInput, MissingInput, explain
from actstore.hub import fetch_folder

__all__ = ["ModelFolder", "find_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True)
class ModelFolder:
    """A model's files on this machine, and how to call it."""

    path: Path
    name: str
    revision: str | None  # resolved commit of a hub model


def find_model(source: str | Path, revision: str | None, *, weights: bool) -> ModelFolder:
    """Return the folder of a model, fetched through the hub's cache unless `source` is a folder.

    A folder wins over a hub id of the same spelling. Without `weights`, the configuration alone is fetched.
    Raises MissingInput where there is no such folder or model, InvalidInput for a revision of a folder.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InvalidInput(explain(f"The folder {source} has no revision {revision!r}", next_step="leave it out"))
        return ModelFolder(folder, folder.resolve().name, None)
    if folder.exists():
        raise InvalidInput(explain(f"{source} is a file", accepted="a model's folder or a hub id"))
    if not _HUB_ID.fullmatch(str(source)):
        raise MissingInput(
            explain(f"There is no folder {source}", accepted="a folder with config.json, or a hub id 'owner/name'")
        )
    patterns = [*_WEIGHTS, "config.json"] if weights else ["config.json"]
    path = fetch_folder(str(source), patterns, revision=revision)
    return ModelFolder(path, str(source), path.name)
