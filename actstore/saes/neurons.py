"""Neurons as features: the identity coder of a site, of which the largest positive numbers of each row are kept.

    f = x where x > 0, else 0; then only the k largest of a row, ties to the lower index        x_hat = f

It has no weights. `l0` counts everything that fires, so that a row of which more fired than were kept can be told;
the error is what is not kept: the rest, and everything negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from actstore.errors import InvalidInput, explain
from actstore.recipe import SaeIdentity
from actstore.sealed import digest_of
from actstore.sites import Missing, Site, expand_sites, not_on_model

from .arguments import SaeArgument, parse_sae_argument
from .compaction import compact
from .encoder import SaeEncoder
from .rules import keep_largest
from .tile import EncodedTile, TileRows, tile_of

if TYPE_CHECKING:
    import torch

__all__ = ["NEURONS", "Encoder", "NeuronEncoder", "expand_neurons", "without_neurons"]

NEURONS = "neurons"  # the architecture, and before a colon what begins an argument
_PREFIX = f"{NEURONS}:"
_DIGEST = digest_of({"architecture": NEURONS, "feature": "x where x > 0, else 0", "reconstruction": "the features"})


def without_neurons(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that name files of SAEs: all but `[ID=]neurons:SITE`."""
    return [text for text in arguments if not _is_neurons(parse_sae_argument(text))]


def expand_neurons(
    arguments: Sequence[str],
    available: Sequence[Site],
    width: Callable[[Site], int],
    n_kept: int,
    missing: Missing = not_on_model,
) -> list[SaeIdentity]:
    """Return the identity coders that `[ID=]neurons:SITE` among the arguments ask for, of each in forward order.

    SITE is a name, range, list or glob of the available sites; n_kept are the activations of a row that are kept.
    Raises what `missing` makes for a site that is not available, InvalidInput for `pattern`, for one id of several
    sites and for an `@SITE`.
    """
    parsed = [argument for argument in map(parse_sae_argument, arguments) if _is_neurons(argument)]
    return [
        _identity(argument.id or _default_id(site), site, width(site), n_kept)
        for argument in parsed
        for site in _sites(argument, available, missing)
    ]


def _is_neurons(argument: SaeArgument) -> bool:
    return argument.source.startswith(_PREFIX)


def _sites(argument: SaeArgument, available: Sequence[Site], missing: Missing) -> tuple[Site, ...]:
    pattern = argument.source.removeprefix(_PREFIX)
    if argument.site:
        raise InvalidInput(
            explain(
                f"{argument.source}@{argument.site} names a site twice",
                accepted=f"[ID=]{_PREFIX}SITE",
                next_step=f"leave '@{argument.site}' out",
            )
        )
    sites = expand_sites((pattern,), available, missing)
    if any(site.kind == "pattern" for site in sites):
        raise InvalidInput(
            explain(
                f"{argument.source} are attention weights: what they are of is another key on every row",
                accepted="sites whose dimensions mean the same on every row, mlp_act above all",
                next_step="keep the heaviest keys instead: --attention-top 16",
            )
        )
    if argument.id and len(sites) > 1:
        raise InvalidInput(
            explain(
                f"{argument.source} names {len(sites)} sites, and there is one id {argument.id!r} for them",
                next_step="leave the id out, or give one argument per site",
            )
        )
    return sites


def _default_id(site: Site) -> str:
    """Return the id of a site's neurons: `5-neurons-mlp_act`, the layer first as Neuronpedia has it."""
    return f"{NEURONS}-{site.kind}" if site.layer is None else f"{site.layer}-{NEURONS}-{site.kind}"


def _identity(sae: str, site: Site, width: int, n_kept: int) -> SaeIdentity:
    return SaeIdentity(
        sae=sae,
        site=str(site),
        width=width,
        d_in=width,
        architecture=NEURONS,
        weights_digest=_DIGEST,
        truncated_to=n_kept if n_kept < width else None,
    )


class NeuronEncoder:
    """The identity coder of a site; encodes like `SaeEncoder`, on whatever device the rows are."""

    def __init__(self, identity: SaeIdentity) -> None:
        """Take the identity that `expand_neurons` gives."""
        self.identity = identity

    def encode(
        self,
        rows: torch.Tensor | TileRows,
        listed: torch.Tensor | None = None,
        targets: torch.Tensor | TileRows | None = None,
        *,
        n_slots: int | None = None,
    ) -> EncodedTile:
        """Encode one tile: rows (row, width) of any float dtype; there are no targets, as this is no transcoder.

        listed bool (row): the rows whose firings are wanted, by default all. Of a row with NaN or infinity nothing is
        kept, as by any encoder. n_slots: as of `SaeEncoder`. Raises InvalidInput for rows of another width.
        """
        import torch

        assert targets is None, "neurons reconstruct what they read"
        with torch.no_grad():
            read = TileRows.of(rows)
            self._check(read)
            exact, finite = read.exact, read.finite
            l0 = (exact > 0).sum(dim=1, dtype=torch.int32).float()
            kept = exact.clamp(min=0)
            if self.identity.truncated_to is not None:
                kept = keep_largest(kept, self.identity.truncated_to)
            reconstruction = torch.stack([l0, exact.norm(dim=1), (exact - kept).norm(dim=1)], dim=1)
            reconstruction.masked_fill_(~finite[:, None], torch.nan)
            wanted = finite if listed is None else finite & listed
            return tile_of(compact(kept, kept > 0, n_slots), wanted, reconstruction)

    def _check(self, rows: TileRows) -> None:
        shape = tuple(rows.exact.shape)
        if len(shape) != 2 or shape[1] != self.identity.width:
            raise InvalidInput(
                explain(
                    f"The neurons {self.identity.sae} cannot be read from rows of shape {shape}",
                    accepted=f"(row, {self.identity.width})",
                )
            )


Encoder: TypeAlias = SaeEncoder | NeuronEncoder
