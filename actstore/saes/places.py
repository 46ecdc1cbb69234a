"""Where SAEs are: folders and files of a known layout, on this machine or on the hub, by path, glob or `canonical`."""

from __future__ import annotations

import errno
import glob
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from actstore.errors import MissingInput, UnsupportedFormat, explain
from actstore.hub import FetchedFile, fetch_file, is_cached, list_release

from .formats import FORMATS, GEMMA_SCOPE, Format, format_of_file, recognise
from .names import nearest_canonical, read_name
from .patterns import by_numbers, matches

__all__ = ["Place", "find_places", "local_path"]

_CANONICAL = "canonical"
_HUB_PATH = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*/[^/].*")
_WEIGHTS = (".safetensors", ".npz", ".pt", ".bin")
_ACCEPTED = "; ".join(f"{format_.files} ({format_.name})" for format_ in FORMATS)


@dataclass(frozen=True)
class Place:
    """One SAE's folder and weights: local where `repository` is None, else inside that repository of the hub."""

    folder: str  # with slashes; on the hub it begins with owner/repo
    repository: str | None = None
    format: Format = GEMMA_SCOPE
    canonical: bool = False  # a listing of its release has shown that its L0 is nearest 100
    weights: str = ""  # the path of its weights in the folder; needed where a folder has those of several SAEs

    def __post_init__(self) -> None:
        assert self.weights or not self.format.shares_folders, "which one is meant must be said"
        object.__setattr__(self, "weights", self.weights or self.format.weights)

    def __str__(self) -> str:
        return self.file if self.format.shares_folders else self.folder

    @property
    def file(self) -> str:
        """The path of its weights."""
        return f"{self.folder}/{self.weights}"

    @property
    def inner_path(self) -> str:
        """What names it inside the repository: its folder, empty for the repository itself, or its weights."""
        assert self.repository is not None
        return str(self).removeprefix(self.repository).strip("/")

    def fetch(self, file: str) -> FetchedFile:
        """Return one of its files on this machine; raises MissingInput where it cannot be had from the hub."""
        if self.repository is None:
            return FetchedFile(Path(self.folder) / file, None)
        return fetch_file(self.repository, f"{self.folder}/{file}".removeprefix(f"{self.repository}/"))


def find_places(source: str) -> list[Place]:
    """Return the places that a source names, at least one, ordered by the numbers in their paths.

    Raises MissingInput where there is none, UnsupportedFormat for sources and files that are not read, InvalidInput
    for a folder that could be of several formats.
    """
    if local := local_path(source):
        return _ordered(_local_places(local))
    if found := _matching_places(str(_at_home(source))):
        return _ordered(found)
    if not _HUB_PATH.fullmatch(source):
        raise MissingInput(
            explain(
                f"There is no SAE at {source}",
                accepted=f"owner/repo/path on the hub, a glob, or a folder with {_ACCEPTED}",
            )
        )
    return _on_the_hub(source)


def local_path(source: str) -> Path | None:
    """Return the path of this machine that a source is, or None where nothing is there."""
    path = _at_home(source)
    try:
        return path if path.exists() else None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # as a list of sites may be
            raise
        return None


def _at_home(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:  # nobody here has the home that it begins with
        return Path(source)


def _local_places(local: Path) -> list[Place]:
    """Return the folder itself, or every one below that has an SAE; paths are absolute, so that the release is seen."""
    if local.is_file():
        return [_place_of_file(local.parent.resolve() / local.name)]
    if places := _places_at(local):
        return places
    folders = {_above(path, format_) for format_ in FORMATS for path in local.rglob(format_.weights)}
    found = [place for folder in folders for place in _places_at(folder)]
    if not found:
        raise _nothing_in(local)
    return found


def _place_of_file(path: Path) -> Place:
    format_ = format_of_file(path.as_posix())
    if format_ is None:
        raise _not_read(str(path))
    folder, weights = format_.taken_apart(path.as_posix())
    config = {format_.config} if format_.config and (Path(folder) / format_.config).is_file() else set()
    recognise(folder, {weights, *config})
    return Place(folder, format=format_, weights=weights)


def _places_at(folder: Path) -> list[Place]:
    """Return the SAEs whose folder this is."""
    patterns = {name for format_ in FORMATS for name in (format_.weights, format_.config) if name}
    found = (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return _places_in(folder.resolve().as_posix(), {path.relative_to(folder).as_posix() for path in found})


def _places_in(folder: str, files: Collection[str], repository: str | None = None) -> list[Place]:
    recognised = recognise(folder, files)
    if recognised is None:
        return []
    format_, weights = recognised
    return [Place(folder, repository, format=format_, weights=one) for one in weights]


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
    found = [place for match in glob.glob(wanted) for place in _places_named(Path(match))]  # noqa: PTH207
    if not canonical:
        return found
    nearest = set(nearest_canonical(place.folder for place in found))
    return [place for place in found if place.folder in nearest]


def _places_named(path: Path) -> list[Place]:
    """Return the SAEs that one match of a glob names: those of a folder, or that of a file of weights."""
    if path.is_file():
        return [_place_of_file(path.parent.resolve() / path.name)] if format_of_file(path.as_posix()) else []
    return _places_at(path)


def _on_the_hub(source: str) -> list[Place]:
    repository = "/".join(source.split("/")[:2])
    named = format_of_file(source)
    wanted, canonical = _without_canonical(source.removesuffix(f"/{named.weights}") if named else source)
    if not glob.has_magic(wanted):
        if named:
            folder, weights = named.taken_apart(source)
            return [Place(folder, repository, format=named, weights=weights)]
        return _ordered(_folder_on_the_hub(repository, wanted.rstrip("/")))
    found = _places_of(repository)
    places = [place for place in found if matches(place.folder, wanted) or matches(place.file, wanted)]
    if not places:
        raise MissingInput(explain(f"Nothing in {repository} matches {source}", accepted=f"folders with {_ACCEPTED}"))
    nearest = set(nearest_canonical(place.folder for place in found))
    chosen = [place for place in places if place.folder in nearest] if canonical else places
    return _ordered(replace(place, canonical=place.folder in nearest) for place in chosen)


def _folder_on_the_hub(repository: str, folder: str) -> list[Place]:
    """Return a folder's SAEs: by its name, by what the cache has of it, or by the repository's list of files."""
    if read_name(folder):
        return [Place(folder, repository)]
    inner = folder.removeprefix(f"{repository}/")
    named = [format_ for format_ in FORMATS if not format_.shares_folders]  # the cache tells nothing of the others
    names = {name for format_ in named for name in (format_.weights, format_.config) if name}
    cached = {name for name in names if is_cached(repository, f"{inner}/{name}")}
    if any({format_.weights, format_.config} - {None} <= cached for format_ in named):
        return _places_in(folder, cached, repository)
    listed = {path.removeprefix(f"{inner}/") for path in list_release(repository) if path.startswith(f"{inner}/")}
    if places := _places_in(folder, listed, repository):
        return places
    raise MissingInput(explain(f"The folder {folder} holds no SAE that is read", accepted=_ACCEPTED))


def _places_of(repository: str) -> list[Place]:
    """Return the place of every file of weights in a repository."""
    found = []
    for path in sorted(set(list_release(repository))):
        if format_ := format_of_file(path):
            folder, weights = format_.taken_apart(f"{repository}/{path}")
            found.append(Place(folder, repository, format=format_, weights=weights))
    return found


def _without_canonical(pattern: str) -> tuple[str, bool]:
    parent, _, last = pattern.rpartition("/")
    return (f"{parent}/average_l0_[0-9]*", True) if last == _CANONICAL else (pattern, False)


def _ordered(places: Iterable[Place]) -> list[Place]:
    return sorted(places, key=lambda place: by_numbers(place.file))
