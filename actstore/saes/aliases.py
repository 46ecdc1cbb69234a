"""`saelens:release/sae_id` and `neuronpedia:model/source` of Gemma Scope: folders on the hub, without any registry."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable

from actstore.errors import unknown_name

from .neuronpedia import SECOND_FOLDERS, google_sources, repositories_of
from .patterns import by_numbers, matches

__all__ = ["NEURONPEDIA", "SAELENS", "google_folders", "matching"]

SAELENS = "saelens:"
NEURONPEDIA = "neuronpedia:"

_FIRST = re.compile(r"(?P<release>gemma-scope-(?:2b|9b|27b)-(?:pt|it)-(?:res|att|mlp|transcoders))(?:-canonical)?")
_SECOND = re.compile(
    rf"(?P<repository>gemma-scope-2-(?:270m|1b|4b|12b|27b)-(?:pt|it))-(?P<kind>{'|'.join(SECOND_FOLDERS)})(?P<all>-all)?"
)
_WITH_L0 = re.compile(
    r"(?P<model>[^/]+)/(?P<layer>[^/]+)-gemmascope-(?P<kind>res|att|mlp|transcoder)-(?P<width>\d+[km])__l0-(?P<l0>\d+)"
)


def google_folders(source: str) -> list[str] | None:
    """Return what a name of Gemma Scope means on the hub, files of weights or a pattern; None for any other name.

    `canonical` of SAELens and the plain ids of Neuronpedia are those that Neuronpedia has: they and globs over them
    need no hub. Raises UnknownName, listing what exists, for one that it does not have.
    """
    name = source.removeprefix(SAELENS)
    if name != source:
        release, _, inner = name.partition("/")
        if first := _FIRST.fullmatch(release):
            return _of_first(source, f"google/{first['release']}", inner)
        if second := _SECOND.fullmatch(release):
            folder = SECOND_FOLDERS[second["kind"]] + ("_all" if second["all"] else "")
            return [_file(f"google/{second['repository']}/{folder}/{inner.removeprefix(f'{folder}/')}")]
        return None
    name = source.removeprefix(NEURONPEDIA)
    return _of_neuronpedia(source, name) if name != source and "gemmascope" in name else None


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a pattern matches part by part between slashes, or the one that it is."""
    if not glob.has_magic(pattern):
        return [name for name in names if name == pattern]
    return [name for name in names if matches(name, pattern)]


def _of_first(source: str, repository: str, inner: str) -> list[str]:
    parent, _, last = inner.rpartition("/")
    if last != "canonical":
        return [_file(f"{repository}/{inner}")]
    folders = {folder.rpartition("/")[0]: folder for folder in google_sources().values()}
    known = [one for one in folders if one.startswith(f"{repository}/")]
    return _known(source, [folders[one] for one in matching(f"{repository}/{parent}", known)], known)


def _of_neuronpedia(source: str, name: str) -> list[str]:
    if (custom := _WITH_L0.fullmatch(name)) and (repositories := repositories_of(custom["model"])):
        kind = "transcoders" if custom["kind"] == "transcoder" else custom["kind"]
        where = "embedding" if custom["layer"] == "embedding" else f"layer_{custom['layer']}"
        inner = f"{where}/width_{custom['width']}/average_l0_{custom['l0']}"
        return [_file(f"{repositories}-{kind}/{inner}")]
    sources = google_sources()
    near = [one for one in sources if one.partition("/")[0] == name.partition("/")[0]]
    return _known(source, [sources[one] for one in matching(name, sources)], near or sources)


def _known(source: str, found: list[str], known: Iterable[str]) -> list[str]:
    if not found:
        raise unknown_name("SAE", source, known, next_step="choose one that there is, or give a path on the hub")
    return [_file(folder) for folder in sorted(found, key=by_numbers)]


def _file(folder: str) -> str:
    """Return the file in a folder, which says its format, so that the hub need not be asked for a list."""
    if glob.has_magic(folder):
        return folder
    return f"{folder}/{'params.safetensors' if folder.startswith('google/gemma-scope-2-') else 'params.npz'}"
