"""From what the user wrote to a local folder: a path as it is, a hub id through the hub's cache.

The hub's errors are translated here, and nowhere else in this room.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actstore.errors import InvalidInput, MissingInput, explain

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
    return _fetch(str(source), revision, [*_WEIGHTS, "config.json"] if weights else ["config.json"])


def _fetch(name: str, revision: str | None, patterns: list[str]) -> ModelFolder:
    from huggingface_hub import snapshot_download

    with _translated(name, revision):
        path = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    return ModelFolder(path, name, path.name)


@contextmanager
def _translated(name: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise MissingInput(
            explain(
                f"The model {name} is gated, and this machine is not allowed to read it",
                next_step=f"accept its terms on the page of {name} on the hub, then run `hf auth login`",
            )
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MissingInput(explain(f"The model {name} has no revision {revision!r}")) from error
    except errors.RepositoryNotFoundError as error:
        raise MissingInput(
            explain(
                f"There is neither a folder nor a hub model {name}",
                next_step="check the spelling; for a private model run `hf auth login`",
            )
        ) from error
    except OSError as error:
        raise MissingInput(
            explain(
                f"There is no folder {name}, and the hub could not be asked for it ({type(error).__name__})",
                next_step=f"run `hf download {name}` where there is a connection, or give a local folder",
            )
        ) from error
