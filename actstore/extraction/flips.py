"""How far what is encoded from a stored site can be from what extraction makes of the same coder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from actstore.blocks import FLAG_SPECIAL, RowFirings, TokenShard
from actstore.health import HealthCheck
from actstore.recipe import Recipe, SaeIdentity
from actstore.saes import Encoder

from .shard_encoder import ShardEncoder
from .tiles import sites_of
from .work import whole_shard

__all__ = ["flip_checks"]

NAME = "sae_flips"


@dataclass(frozen=True)
class _Extracted:
    """The same coder, extracted with the model: its id, and a shard that has both its firings and its site."""

    sae: str
    shard: int


def flip_checks(encoder: ShardEncoder, shards: Sequence[int]) -> Iterator[HealthCheck]:
    """Yield for each coder how many of 1,000 firings differ from extraction.

    None do where its sites are stored as they were computed: the same tiles of the same numbers. Where they were
    rounded only the model could tell, and `ok` is None. Where the same coder was extracted too, it is measured.
    """
    for one in encoder.encoders:
        rounded = [site for site in sites_of(one) if not encoder.stored.is_exact(site)]
        names = ", ".join(map(str, rounded or sites_of(one)))
        how = f"stored {'with rounding' if rounded else 'as computed'}: {names}"
        sae = one.identity.sae
        if found := _extracted(encoder, one.identity, shards):
            value = _flips(encoder, one, found)
            expected = f"{'few' if rounded else '0'} of 1,000 firings of {found.sae}, as extracted; {how}"
            yield HealthCheck(NAME, sae, value, expected, None if rounded else value == 0)
        elif rounded:
            yield HealthCheck(NAME, sae, None, f"not measured, only the model could tell; {how}", None)
        else:
            yield HealthCheck(NAME, sae, 0.0, f"0 of 1,000 firings differ from extraction; {how}", True)


def _extracted(encoder: ShardEncoder, identity: SaeIdentity, shards: Sequence[int]) -> _Extracted | None:
    reader = encoder.stored.reader
    for row in reader.saes:
        recipe = Recipe.from_json(reader.passes[row["pass"]].recipe)
        same = recipe.sae_precision == encoder.recipe.sae_precision
        same &= any(coder.sae == row["sae"] and _is_same(coder, identity) for coder in recipe.saes)
        done = reader.done(f"firings/{row['sae']}")
        both = next((shard for shard in shards if shard in done), None)
        if same and not recipe.sources and both is not None:
            return _Extracted(row["sae"], both)
    return None


def _is_same(one: SaeIdentity, other: SaeIdentity) -> bool:
    """Return whether two identities have the same firings, whatever they are called and wherever they come from."""
    kept = ("site", "width", "d_in", "architecture", "weights_digest", "truncated_to")
    return all(getattr(one, name) == getattr(other, name) for name in kept)


def _flips(encoder: ShardEncoder, one: Encoder, found: _Extracted) -> float:
    """Return how many firings are in one and not in the other, per 1,000 extracted ones; special rows left out."""
    shard = whole_shard(encoder.stored.reader, found.shard)
    encoded = replace(encoder, encoders=[one]).start(shard)().firings[one.identity.sae]
    extracted = encoder.stored.reader.firings(found.sae, found.shard)
    here, there = (_places(firings, shard, one.identity.width) for firings in (encoded, extracted))
    return 1000 * len(np.setxor1d(here, there, assume_unique=True)) / max(1, len(there))


def _places(firings: RowFirings, shard: TokenShard, width: int) -> npt.NDArray[np.int64]:
    """Return row · width + feature of every firing on rows that are not special: int64 (firing)."""
    rows = firings.rows()
    places = rows * width + firings.features.astype(np.int64)
    listed: npt.NDArray[np.bool_] = (shard.column("flags")[rows] & FLAG_SPECIAL) == 0
    return np.asarray(places[listed])
