"""Which stored sites the last residual stream is the sum of: a state of the stream, and all that was added after it.

A state of the stream has a place: resid_pre.L, which is resid_post.L-1, is at 2L, resid_mid.L at 2L + 1. attn_out.L is
added behind place 2L, mlp_out.L behind 2L + 1; in parallel blocks there is no state at 2L + 1.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from actstore.errors import MissingInput, explain
from actstore.sites import Site, parse_site
from actstore.store import StoreReader

__all__ = ["Decomposition", "Part", "decompose"]

STATES = ("resid_pre", "resid_mid", "resid_post")
ADDED = ("attn_out", "mlp_out")
# Sites that a term can be computed from, the one that tells most apart first.
SOURCES = {"attn_out": ("z", "attn_out", "attn_out_raw"), "mlp_out": ("mlp_out", "mlp_out_raw", "mlp_act")}


@dataclass(frozen=True)
class Part:
    """A summand of the last residual stream: what it is called, and the stored site that it is computed from."""

    name: str  # "embedding", a state's kind, "attn_out" or "mlp_out"
    site: Site
    by_features: bool = False  # told apart by an SAE's features


@dataclass(frozen=True)
class Decomposition:
    """The last residual stream and its summands, the state first."""

    last: Site
    parts: tuple[Part, ...]


def decompose(reader: StoreReader, written: Site | None = None) -> Decomposition:
    """Return the finest decomposition that a store has; `written` is the site whose features are told apart.

    It begins with the earliest stored state of the stream behind which every term is stored; where `written` is a state
    with that. Raises MissingInput, with the sites to add, where the last resid_post, `written` or what is behind it is
    not stored.
    """
    n_layers = int(reader.store.model["facts"]["n_layers"])
    last, stored = Site("resid_post", n_layers - 1), {parse_site(row["site"]) for row in reader.sites}
    _must_have(reader, [last, *([written] if written else [])], stored)
    usable = {site for site in stored if site.kind in (*STATES, *ADDED) or reader.kit.has(f"output/{site}")}
    terms = [_term(place, usable, written) for place in range(2 * n_layers)]
    first = 1 + max((place for place, term in enumerate(terms) if term is None), default=-1)
    needed = 2 * n_layers if written is None else _place(written)
    states = ((place, _state(place, usable, written)) for place in range(first, 2 * n_layers + 1))
    place, state = next(((place, state) for place, state in states if state), (needed + 1, None))
    if state is None or place > needed:
        between = [_site_of_term(one) for one in range(needed, 2 * n_layers) if terms[one] is None]
        raise _cannot_reach(reader, written or last, between or [Site("resid_pre", needed // 2)])
    return Decomposition(last, (state, *(term for term in terms[place:] if term is not None)))


def _place(site: Site) -> int:
    """Return the place of a state, or the one behind which a term is added."""
    assert site.layer is not None
    behind = {"resid_pre": 0, "resid_mid": 1, "resid_post": 2} | {
        kind: number for number, added in enumerate(ADDED) for kind in (added, *SOURCES[added])
    }
    return 2 * site.layer + behind[site.kind]


def _state(place: int, usable: Collection[Site], written: Site | None) -> Part | None:
    layer, is_mid = divmod(place, 2)
    sites = [Site("resid_mid", layer)] if is_mid else [Site("resid_pre", layer)]
    sites += [Site("resid_post", layer - 1)] if layer and not is_mid else []
    if written is not None and written.kind in STATES:
        return Part(written.kind, written, by_features=True) if written in sites else None
    found = next((site for site in sites if site in usable), None)
    return None if found is None else Part("embedding" if place == 0 else found.kind, found)


def _term(place: int, usable: Collection[Site], written: Site | None) -> Part | None:
    layer, which = divmod(place, 2)
    added = ADDED[which]
    sites = [Site(kind, layer) for kind in SOURCES[added]]
    if written in sites:
        return Part(added, written, by_features=True)
    found = next((site for site in sites if site in usable), None)
    return None if found is None else Part(added, found)


def _site_of_term(place: int) -> Site:
    return Site(ADDED[place % 2], place // 2)


def _must_have(reader: StoreReader, sites: Collection[Site], stored: Collection[Site]) -> None:
    missing = [site for site in sites if site not in stored]
    if missing:
        what = f"{missing[0]} is not stored, and an attribution begins from it"
        raise MissingInput(explain(what, next_step=_command(reader, missing)))


def _cannot_reach(reader: StoreReader, written: Site, missing: list[Site]) -> MissingInput:
    what = f"What {written} adds to the last residual stream is not known without {', '.join(map(str, missing))}"
    return MissingInput(explain(what, next_step=_command(reader, missing)))


def _command(reader: StoreReader, missing: Collection[Site]) -> str:
    return f"actstore extract MODEL --into {reader.location.url} " + " ".join(f"--site {site}" for site in missing)
