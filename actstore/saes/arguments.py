"""`[ID=]SOURCE[@SITE]`, as users write it, to SAEs with an id, a site and a place; `@READ>WRITE` for a transcoder.

SOURCE is a local file of weights, a folder with one SAE or with several below it, a glob of such, `owner/repo/path` on
the hub, or a name: `saelens:release/sae_id`, `neuronpedia:model/source`. A last part `canonical` takes the SAE whose
average L0 is nearest 100. A local path wins over a hub path.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from actstore.errors import InvalidInput, UnsupportedFormat, explain
from actstore.sites import Site, parse_site

from .agreed import agreed_sites, overruled_sites
from .configured import configuration_of
from .declaration import Declaration
from .faults import spelled
from .formats import GEMMA_SCOPE
from .multi_layer import read_layer_name
from .names import SaeName, fallback_id, read_name
from .places import Place, find_places, local_path
from .registry import Listed, meanings
from .second_scope import read_second_name

__all__ = ["ResolvedSae", "SaeArgument", "expand_sae_arguments", "parse_sae_argument"]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_WITH_ID = re.compile(rf"({_ID.pattern})=(.+)", re.DOTALL)


@dataclass(frozen=True)
class SaeArgument:
    """One argument, taken apart and not yet looked up."""

    source: str
    id: str | None = None
    site: Site | None = None
    write_site: Site | None = None


@dataclass(frozen=True)
class ResolvedSae:
    """One SAE: what it is called in the store, which site it reads, where its file is."""

    sae: str
    site: Site
    place: Place
    name: SaeName | None  # what its path says, where it is named like Gemma Scope's
    declaration: Declaration  # what its format and configuration say
    write_site: Site | None = None  # the site that a transcoder reconstructs
    neuronpedia_id: str | None = None  # `model/source`, where Neuronpedia has it
    listed: Listed | None = None  # what the registry says of it, where it was named by it
    overruled: str | None = None  # what its configuration says of its sites and the argument says otherwise

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.sae):
            raise InvalidInput(
                explain(
                    f"The SAE id {self.sae!r} cannot be used", accepted="letters, digits, '.', '_', '-', at most 128"
                )
            )


def parse_sae_argument(text: str) -> SaeArgument:
    """Take `[ID=]SOURCE[@SITE]` or `…@READ>WRITE` apart; a local path that contains = or @ is a SOURCE as a whole.

    Raises InvalidInput or UnknownName for a SITE that is none, InvalidInput for an empty SOURCE.
    """
    if text and local_path(text):
        return SaeArgument(text)
    with_id = _WITH_ID.fullmatch(text)
    sae, rest = (with_id[1], with_id[2]) if with_id else (None, text)
    source, _, site = rest.rpartition("@") if "@" in rest else (rest, "", "")
    if not source:
        raise InvalidInput(explain(f"The SAE {text!r} has no source", accepted="[ID=]SOURCE[@SITE]"))
    read, _, written = site.partition(">")
    sites = (parse_site(read), parse_site(written) if ">" in site else None) if "@" in rest else (None, None)
    return SaeArgument(source, sae, *sites)


def expand_sae_arguments(arguments: Sequence[str], *, allow_pt: bool = False) -> list[ResolvedSae]:
    """Return the SAEs that the arguments name: those of one argument in order of their path's numbers.

    allow_pt: read files of torch.save too, their tensors and nothing else.
    Reads configurations and no weights. The hub is asked for a listing by `canonical`, globs and paths that do not say
    their format, and for configurations.
    Raises MissingInput where nothing is there, InvalidInput for a site that is unknown or contradicts the path and for
    an id that is used twice, UnsupportedFormat for formats and architectures that are not read.
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
    found = [(place, listed) for path, listed in meanings(argument.source) for place in find_places(path)]
    places = [place for place, _ in found]
    if pickled := [place for place in places if place.format.pickled and not allow_pt]:
        raise _pickle_refused(pickled[0])
    if argument.id and len(places) > 1:
        raise InvalidInput(
            explain(
                f"{argument.source} names {len(places)} SAEs, and there is one id {argument.id!r} for them",
                next_step="leave the id out, or give one argument per SAE",
            )
        )
    return [_resolve(argument, place, listed) for place, listed in found]


def _pickle_refused(place: Place) -> UnsupportedFormat:
    return UnsupportedFormat(
        explain(
            f"{place.folder} holds {place.weights}, a pickle: a program that runs when it is opened",
            accepted="safetensors and npz",
            next_step="where you trust its makers say --allow-pt (allow_pt=True): tensors alone are read of it",
        )
    )


def _resolve(argument: SaeArgument, place: Place, listed: Listed | None) -> ResolvedSae:
    name = read_name(place.folder, canonical=place.canonical) if place.format is GEMMA_SCOPE else None
    declaration = _declaration(place, listed)
    site, write_site = agreed_sites(argument, place, name, declaration)
    named = name if name and (name.site, name.write_site) == (site, write_site) else None
    known = named or read_second_name(place.folder) or read_layer_name(str(place)) or listed
    sae = argument.id or (known.id if known else fallback_id(site, place.folder))
    neuronpedia_id = known.neuronpedia_id if known else None
    overruled = None if name else overruled_sites(site, write_site, place, declaration)
    return ResolvedSae(sae, site, place, name, declaration, write_site, neuronpedia_id, listed, overruled)


def _declaration(place: Place, listed: Listed | None) -> Declaration:
    """Return what an SAE's configuration says; raises UnsupportedFormat with everything in it that is not read."""
    config = configuration_of(place)
    declaration = (listed or place.format).declare(config, str(place))
    if config.faults:
        raise UnsupportedFormat(
            explain(
                f"The SAE {place} cannot be used as its {place.format.described_by} describes it: "
                f"{spelled(config.faults)}",
                next_step="choose another SAE",
            )
        )
    return declaration
