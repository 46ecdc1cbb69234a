"""The sites that an SAE reads and writes, by all who say them: the user, its path, its configuration.

A path and the user must agree. A configuration can be wrong, and cannot be given another name: what the user says wins
over it, is reported, and is proved like any other site.

A transcoder reconstructs another site than it reads; its argument is `@READ>WRITE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from actstore.errors import InvalidInput, explain
from actstore.sites import Site

from .declaration import Declaration
from .names import SaeName
from .places import Place

if TYPE_CHECKING:
    from .arguments import SaeArgument

__all__ = ["agreed_sites", "overruled_sites"]


def agreed_sites(
    argument: SaeArgument, place: Place, name: SaeName | None, declaration: Declaration
) -> tuple[Site, Site | None]:
    """Return the one site that is read and, of a transcoder, the one that is written.

    Raises InvalidInput where argument and path disagree, where nobody says it, where a configuration says several and
    the argument none, and for a site to write of what is no transcoder.
    """
    transcodes = _transcodes(argument, place, name, declaration)
    said = (name.site,) if name and name.site else declaration.sites
    example = "ln2.12>mlp_out.12" if transcodes else "resid_post.12"
    read = _agreed(argument, place, argument.site, said, "reads", example)
    if not transcodes:
        return read, None
    said = (name.write_site,) if name and name.write_site else declaration.write_sites
    written = _agreed(argument, place, argument.write_site, said, "writes", f"{read}>mlp_out.12", f"{read}>")
    if written == read:
        raise InvalidInput(
            explain(
                f"{place} is a transcoder, and reads and writes {read}",
                accepted="two sites, such as '@ln2.12>mlp_out.12'",
            )
        )
    return read, written


def overruled_sites(site: Site, write_site: Site | None, place: Place, declaration: Declaration) -> str | None:
    """Return for a report what the argument says and the configuration says otherwise; None where they agree."""
    pairs = [(site, declaration.sites), (write_site, declaration.write_sites)]
    told = [
        f"site {asked} as asked; its {_speaker(place)} says {' or '.join(map(str, said))}"
        for asked, said in pairs
        if asked and said and asked not in said
    ]
    return "; ".join(told) or None


def _transcodes(argument: SaeArgument, place: Place, name: SaeName | None, declaration: Declaration) -> bool:
    """Return whether another site is written than is read; a file that cannot tell leaves it to the argument."""
    transcodes = name.write_site is not None if name and name.site else declaration.transcodes
    if transcodes is None:
        return argument.write_site is not None
    if argument.write_site and not transcodes:
        raise InvalidInput(
            explain(
                f"{place} reconstructs what it reads by its {_speaker(place)}, and {argument.write_site} by "
                f"'>{argument.write_site}'",
                next_step=f"leave '>{argument.write_site}' out",
            )
        )
    return transcodes


def _agreed(
    argument: SaeArgument,
    place: Place,
    asked: Site | None,
    said: Sequence[Site],
    verb: str,
    example: str,
    before: str = "",
) -> Site:
    """Return the one site of which all agree; `before` stands before it behind the '@' of an argument."""
    mark = "@" if verb == "reads" else ">"
    if asked and said and asked not in said and place.format.config is None:
        raise InvalidInput(
            explain(
                f"{place} {verb} {' or '.join(map(str, said))} by its {_speaker(place)}, and {asked} by "
                f"'{mark}{asked}'",
                next_step=f"leave '{mark}{asked}' out, or give a link to it whose path does not say another site",
            )
        )
    if asked:
        return asked
    if len(said) > 1:
        raise InvalidInput(
            explain(
                f"The {_speaker(place)} of {place} says that it {verb} {' and '.join(map(str, said))}",
                next_step=f"say which: {_quoted(f'{argument.source}@{before}{said[0]}')}",
            )
        )
    if not said:
        raise InvalidInput(
            explain(
                f"Nothing says which site the SAE {place} {verb}",
                accepted="a release that ends in -res, -att, -mlp or -transcoders, a hook in its configuration, or a "
                "site behind '@'",
                next_step=f"add the site: {_quoted(f'{argument.source}@{example}')}",
            )
        )
    return said[0]


def _quoted(argument: str) -> str:
    """Quote what a shell would take for a redirection."""
    return f"'{argument}'" if ">" in argument else argument


def _speaker(place: Place) -> str:
    return " or ".join(dict.fromkeys(("path", place.format.described_by)))
