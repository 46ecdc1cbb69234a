"""Where SAEs are: folders of a known layout, on this machine or on the hub, by path, glob or `canonical`."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from actstore.errors import MissingInput, UnsupportedFormat, explain

from .formats import FORMATS, GEMMA_SCOPE, Format, format_of_file, recognise
from .hub import is_cached, list_release
from .names import nearest_canonical, read_name

__all__ = ["Place", "find_places"]

_CANONICAL = "canonical"
_HUB_PATH = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*/[^/].*")
_OTHER_HOMES = ("saelens:", "neuronpedia:")
_WEIGHTS = (".safetensors", ".npz", ".pt", ".bin")
_ACCEPTED = "; ".join(f"{format_.files} ({format_.name})" for format_ in FORMATS)


@dataclass(frozen=True)
class Place:
    """One SAE's folder: local where `repository` is None, else a path inside that repository of the hub."""

    folder: str  # with slashes; on the hub it begins with owner/repo
    repository: str | None = None
    format: Format = GEMMA_SCOPE
    canonical: bool = False  # a listing of its release has shown that its L0 is nearest 100

    def __str__(self) -> str:
        return self.folder

    @property
    def inner_folder(self) -> str:
        """The folder inside the repository, empty for the repository itself."""
        assert self.repository is not None
        return self.folder.removeprefix(self.repository).strip("/")

    def path_of(self, file: str) -> str:
        """Return the path of one of its files inside the repository."""
        return f"{self.inner_folder}/{file}".lstrip("/")


def find_places(source: str) -> list[Place]:
    """Return the places that a source names, at least one, ordered by the numbers in their paths.

    Raises MissingInput where there is none, UnsupportedFormat for sources and files that are not read, InvalidInput
    for a folder that could be of several formats.
    """
    if source.startswith(_OTHER_HOMES):
        raise UnsupportedFormat(
            explain(f"{source} is not read yet", accepted="a local path, or owner/repo/path on the hub")
        )
    local = Path(source).expanduser()
    if local.exists():
        return _ordered(_local_places(local))
    if matches := _matching_places(str(local)):
        return _ordered(matches)
    if not _HUB_PATH.fullmatch(source):
        raise MissingInput(
            explain(
                f"There is no SAE at {source}",
                accepted=f"owner/repo/path on the hub, a glob, or a folder with {_ACCEPTED}",
            )
        )
    return _on_the_hub(source)


def _local_places(local: Path) -> list[Place]:
    """Return the folder itself, or every one below that has an SAE; paths are absolute, so that the release is seen."""
    if local.is_file():
        return [_place_of_file(local.parent.resolve() / local.name)]
    if place := _place_at(local):
        return [place]
    folders = {_above(path, format_) for format_ in FORMATS for path in local.rglob(format_.weights)}
    found = [place for folder in folders if (place := _place_at(folder))]
    if not found:
        raise _nothing_in(local)
    return found


def _place_of_file(path: Path) -> Place:
    format_ = format_of_file(path.as_posix())
    if format_ is None:
        raise _not_read(str(path))
    folder = _above(path, format_)
    config = {format_.config} if format_.config and (folder / format_.config).is_file() else set()
    recognise(folder.as_posix(), {format_.weights, *config})
    return Place(folder.as_posix(), format=format_)


def _place_at(folder: Path) -> Place | None:
    names = {name for format_ in FORMATS for name in (format_.weights, format_.config) if name}
    there = {name for name in names if (folder / name).is_file()}
    format_ = recognise(folder.as_posix(), there)
    return Place(folder.resolve().as_posix(), format=format_) if format_ else None


def _above(path: Path, format_: Format) -> Path:
    return path.parents[format_.weights.count("/")]


def _nothing_in(local: Path) -> Exception:
    files = sorted(path.name for path in local.iterdir() if path.is_file())[:5]
    if any(name.endswith(_WEIGHTS) for name in files):
        return _not_read(f"{local} with {', '.join(files)}")
    return MissingInput(explain(f"The folder {local} holds no SAE", accepted=f"in it or below it {_ACCEPTED}"))


def _not_read(what: str) -> UnsupportedFormat:
    pickled = ".pt" in what or ".bin" in what
    return UnsupportedFormat(
        explain(
            f"{what} is a format that is not read yet",
            accepted=_ACCEPTED,
            next_step="convert it to safetensors" if pickled else None,
        )
    )


def _matching_places(pattern: str) -> list[Place]:
    named = format_of_file(pattern)
    wanted, canonical = _without_canonical(pattern.removesuffix(f"/{named.weights}") if named else pattern)
    found = [place for match in glob.glob(wanted) if (place := _place_at(Path(match)))]  # noqa: PTH207
    if not canonical:
        return found
    nearest = set(nearest_canonical(place.folder for place in found))
    return [place for place in found if place.folder in nearest]


def _on_the_hub(source: str) -> list[Place]:
    repository = "/".join(source.split("/")[:2])
    named = format_of_file(source)
    wanted, canonical = _without_canonical(source.removesuffix(f"/{named.weights}") if named else source)
    if not glob.has_magic(wanted):
        folder = wanted.rstrip("/")
        return [Place(folder, repository, format=named or _format_on_the_hub(repository, folder))]
    found = _places_of(repository)
    places = [place for place in found if _matches(place.folder, wanted)]
    if not places:
        raise MissingInput(explain(f"Nothing in {repository} matches {source}", accepted=f"folders with {_ACCEPTED}"))
    nearest = set(nearest_canonical(place.folder for place in found))
    chosen = [place for place in places if place.folder in nearest] if canonical else places
    return _ordered(replace(place, canonical=place.folder in nearest) for place in chosen)


def _format_on_the_hub(repository: str, folder: str) -> Format:
    """Return a folder's format: by its name, by what the cache has of it, or by the repository's list of files."""
    if read_name(folder):
        return GEMMA_SCOPE
    inner = folder.removeprefix(f"{repository}/")
    names = {name for format_ in FORMATS for name in (format_.weights, format_.config) if name}
    cached = {name for name in names if is_cached(repository, f"{inner}/{name}")}
    if any({format_.weights, format_.config} - {None} <= cached for format_ in FORMATS):
        found = recognise(folder, cached)
        assert found, "one of them is complete"
        return found
    listed = {path.removeprefix(f"{inner}/") for path in list_release(repository) if path.startswith(f"{inner}/")}
    if format_ := recognise(folder, listed):
        return format_
    raise MissingInput(explain(f"The folder {folder} holds no SAE that is read", accepted=_ACCEPTED))


def _places_of(repository: str) -> list[Place]:
    """Return the place of every file of weights in a repository."""
    listed = set(list_release(repository))
    return [
        Place(f"{repository}/{path}".removesuffix(f"/{format_.weights}"), repository, format=format_)
        for path in listed
        if (format_ := format_of_file(path))
    ]


def _without_canonical(pattern: str) -> tuple[str, bool]:
    parent, _, last = pattern.rpartition("/")
    return (f"{parent}/average_l0_[0-9]*", True) if last == _CANONICAL else (pattern, False)


def _matches(folder: str, pattern: str) -> bool:
    parts, wanted = folder.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _ordered(places: Iterable[Place]) -> list[Place]:
    """Return the places by their folders' names, with numbers compared as numbers: layer_2 before layer_10."""

    def key(place: Place) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", place.folder)]

    return sorted(places, key=key)
