"""Where SAEs are: folders with `params.npz`, on this machine or on the hub, by path, glob or `canonical`."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from actstore.errors import InvalidInput, MissingInput, UnsupportedFormat, explain

from .hub import list_release
from .names import nearest_canonical

__all__ = ["FILE_NAME", "Place", "find_places"]

FILE_NAME = "params.npz"
_CANONICAL = "canonical"
_HUB_PATH = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*/[^/].*")
_OTHER_HOMES = ("saelens:", "neuronpedia:")


@dataclass(frozen=True)
class Place:
    """One SAE's folder: local where `repository` is None, else a path inside that repository of the hub."""

    folder: str  # with slashes; on the hub it begins with owner/repo
    repository: str | None = None
    canonical: bool = False  # a listing of its release has shown that its L0 is nearest 100

    def __str__(self) -> str:
        return self.folder

    @property
    def inner_folder(self) -> str:
        """The folder inside the repository."""
        assert self.repository is not None
        return self.folder.removeprefix(f"{self.repository}/")


def find_places(source: str) -> list[Place]:
    """Return the places that a source names, at least one, ordered by the numbers in their paths.

    Raises MissingInput where there is none, UnsupportedFormat for sources and files that are not read.
    """
    if source.startswith(_OTHER_HOMES):
        raise UnsupportedFormat(
            explain(f"{source} is not read yet", accepted="a local path, or owner/repo/path on the hub")
        )
    local = Path(source).expanduser()
    if local.exists():
        return [Place(folder) for folder in _ordered(_folders_in(local))]
    if matches := _matching_folders(str(local)):
        return [Place(folder) for folder in _ordered(matches)]
    if not _HUB_PATH.fullmatch(source):
        raise MissingInput(
            explain(f"There is no SAE at {source}", accepted=f"a folder with {FILE_NAME}, a glob, or owner/repo/path")
        )
    return _on_the_hub(source.removesuffix(f"/{FILE_NAME}"))


def _folders_in(local: Path) -> list[str]:
    """Return the folder itself, or every one below that has an SAE; paths are absolute, so that the release is seen."""
    if local.is_file():
        if local.suffix != ".npz":
            raise UnsupportedFormat(explain(f"{local} is not read", accepted=f"{FILE_NAME} in Gemma Scope's layout"))
        if local.name != FILE_NAME:
            raise InvalidInput(explain(f"{local} has another name than expected", accepted=FILE_NAME))
        return [local.resolve().parent.as_posix()]
    if (local / FILE_NAME).is_file():
        return [local.resolve().as_posix()]
    found = [path.resolve().parent.as_posix() for path in local.rglob(FILE_NAME)]
    if not found:
        raise _nothing_in(local)
    return found


def _nothing_in(local: Path) -> Exception:
    files = sorted(path.name for path in local.iterdir() if path.is_file())[:5]
    if any(name.endswith((".safetensors", ".pt", ".bin")) for name in files):
        return UnsupportedFormat(
            explain(
                f"{local} holds {', '.join(files)}, a format that is not read yet", accepted=f"folders with {FILE_NAME}"
            )
        )
    return MissingInput(explain(f"The folder {local} holds no SAE", accepted=f"{FILE_NAME} in it or below it"))


def _matching_folders(pattern: str) -> list[str]:
    wanted, canonical = _without_canonical(pattern.removesuffix(f"/{FILE_NAME}"))
    found = [Path(match).resolve() for match in glob.glob(wanted) if (Path(match) / FILE_NAME).is_file()]  # noqa: PTH207
    folders = [path.as_posix() for path in found]
    return nearest_canonical(folders) if canonical else folders


def _on_the_hub(source: str) -> list[Place]:
    repository = "/".join(source.split("/")[:2])
    wanted, canonical = _without_canonical(source)
    if not glob.has_magic(wanted):
        return [Place(source, repository)]
    listed = [f"{repository}/{path}" for path in list_release(repository)]
    found = [path.removesuffix(f"/{FILE_NAME}") for path in listed if path.endswith(f"/{FILE_NAME}")]
    folders = [folder for folder in found if _matches(folder, wanted)]
    if not folders:
        raise MissingInput(explain(f"Nothing in {repository} matches {source}", accepted=f"folders with {FILE_NAME}"))
    nearest = set(nearest_canonical(found))
    chosen = [folder for folder in folders if folder in nearest] if canonical else folders
    return [Place(folder, repository, canonical=folder in nearest) for folder in _ordered(chosen)]


def _without_canonical(pattern: str) -> tuple[str, bool]:
    parent, _, last = pattern.rpartition("/")
    return (f"{parent}/average_l0_[0-9]*", True) if last == _CANONICAL else (pattern, False)


def _matches(folder: str, pattern: str) -> bool:
    parts, wanted = folder.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _ordered(folders: Iterable[str]) -> list[str]:
    """Return the folders by their names, with numbers compared as numbers: layer_2 before layer_10."""

    def key(folder: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", folder)]

    return sorted(folders, key=key)
