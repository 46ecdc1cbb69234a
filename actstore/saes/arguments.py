"""`[ID=]SOURCE[@SITE]`, as users write it, to SAEs with an id, a site and a place.

SOURCE is a local file of weights, a folder with one SAE or with several below it, a glob of such, or `owner/repo/path`
on the hub. A last part `canonical` takes the SAE whose average L0 is nearest 100. A local path wins over a hub path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actstore.errors import InvalidInput, UnsupportedFormat, explain
from actstore.sites import Site, parse_site

from .config import Config, read_config
from .declaration import Declaration
from .formats import GEMMA_SCOPE
from .hub import fetch_file
from .names import SaeName, fallback_id, read_name
from .places import Place, find_places

__all__ = ["ResolvedSae", "SaeArgument", "expand_sae_arguments", "parse_sae_argument"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_WITH_ID = re.compile(rf"({_ID.pattern})=(.+)", re.DOTALL)


@dataclass(frozen=True)
class SaeArgument:
    """One argument, taken apart and not yet looked up."""

    source: str
    id: str | None = None
    site: Site | None = None


@dataclass(frozen=True)
class ResolvedSae:
    """One SAE: what it is called in the store, which site it reads, where its file is."""

    sae: str
    site: Site
    place: Place
    name: SaeName | None  # what its path says, where it is named like Gemma Scope's
    declaration: Declaration  # what its format and configuration say

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.sae):
            raise InvalidInput(
                explain(
                    f"The SAE id {self.sae!r} cannot be used", accepted="letters, digits, '.', '_', '-', at most 128"
                )
            )


def parse_sae_argument(text: str) -> SaeArgument:
    """Take `[ID=]SOURCE[@SITE]` apart; a local path that contains = or @ is a SOURCE as a whole.

    Raises InvalidInput or UnknownName for a SITE that is none, InvalidInput for an empty SOURCE.
    """
    if Path(text).expanduser().exists() and text:
        return SaeArgument(text)
    with_id = _WITH_ID.fullmatch(text)
    sae, rest = (with_id[1], with_id[2]) if with_id else (None, text)
    source, _, site = rest.rpartition("@") if "@" in rest else (rest, "", "")
    if not source:
        raise InvalidInput(explain(f"The SAE {text!r} has no source", accepted="[ID=]SOURCE[@SITE]"))
    return SaeArgument(source, sae, parse_site(site) if "@" in rest else None)


def expand_sae_arguments(arguments: Sequence[str], *, allow_pt: bool = False) -> list[ResolvedSae]:
    """Return the SAEs that the arguments name: those of one argument in order of their path's numbers.

    allow_pt: read files of torch.save too, their tensors and nothing else.
    Reads configurations and no weights. The hub is asked for a listing by `canonical`, globs and paths that do not say
    their format, and for configurations.
    Raises MissingInput where nothing is there, InvalidInput for a site that is unknown or contradicts the path or the
    configuration and for an id that is used twice, UnsupportedFormat for formats and architectures that are not read.
    """
    found = [sae for text in arguments for sae in _expand(parse_sae_argument(text), allow_pt)]
    ids = [sae.sae for sae in found]
    if twice := sorted({sae for sae in ids if ids.count(sae) > 1}):
        places = ", ".join(str(sae.place) for sae in found if sae.sae == twice[0])
        raise InvalidInput(
            explain(
                f"The SAE id {twice[0]!r} is given twice, by {places}",
                accepted="ids that differ",
                next_step="name one of them yourself: ANOTHER_ID=SOURCE",
            )
        )
    return found


def _expand(argument: SaeArgument, allow_pt: bool) -> list[ResolvedSae]:
    places = find_places(argument.source)
    if pickled := [place for place in places if place.format.pickled and not allow_pt]:
        raise _pickle_refused(pickled[0])
    if argument.id and len(places) > 1:
        raise InvalidInput(
            explain(
                f"{argument.source} names {len(places)} SAEs, and there is one id {argument.id!r} for them",
                next_step="leave the id out, or give one argument per SAE",
            )
        )
    return [_resolve(argument, place) for place in places]


def _pickle_refused(place: Place) -> UnsupportedFormat:
    return UnsupportedFormat(
        explain(
            f"{place} holds {place.format.weights}, a pickle: a program that runs when it is opened",
            accepted="safetensors and npz",
            next_step="where you trust its makers say --allow-pt (allow_pt=True): tensors alone are read of it",
        )
    )


def _resolve(argument: SaeArgument, place: Place) -> ResolvedSae:
    name = read_name(place.folder, canonical=place.canonical) if place.format is GEMMA_SCOPE else None
    declaration = _declaration(place)
    site = _site(argument, place, (name.site,) if name and name.site else declaration.sites)
    sae = argument.id or (name.id if name and name.site == site else fallback_id(site, place.folder))
    return ResolvedSae(sae, site, place, name, declaration)


def _declaration(place: Place) -> Declaration:
    """Return what an SAE's configuration says; raises UnsupportedFormat with everything in it that is not read."""
    name = place.format.config
    if name is None:
        return place.format.declare(Config({}), place.folder)
    local = Path(place.folder) / name
    config = read_config(fetch_file(place.repository, place.path_of(name)).path if place.repository else local)
    declaration = place.format.declare(config, place.folder)
    if config.faults:
        raise UnsupportedFormat(
            explain(
                f"The SAE {place} cannot be used as its {name} describes it: {'; '.join(config.faults)}",
                next_step="choose another SAE",
            )
        )
    return declaration


def _site(argument: SaeArgument, place: Place, said: Sequence[Site]) -> Site:
    """Return the one site that the argument, the path and the configuration agree on."""
    if argument.site and said and argument.site not in said:
        raise InvalidInput(
            explain(
                f"{place} reads {' or '.join(map(str, said))} by its {_speaker(place)}, and {argument.site} by "
                f"'@{argument.site}'",
                next_step=f"leave '@{argument.site}' out, or give a path that does not say another site",
            )
        )
    if argument.site:
        return argument.site
    if len(said) > 1:
        raise InvalidInput(
            explain(
                f"The {_speaker(place)} of {place} says that it reads {' and '.join(map(str, said))}",
                next_step=f"say which: {argument.source}@{said[0]}",
            )
        )
    if not said:
        raise InvalidInput(
            explain(
                f"Nothing says which site the SAE {place} reads",
                accepted="a release that ends in -res, -att or -mlp, a hook in its configuration, or a site behind '@'",
                next_step=f"add the site: {argument.source}@resid_post.12",
            )
        )
    return said[0]


def _speaker(place: Place) -> str:
    return f"path or {place.format.config}" if place.format.config else "path"
