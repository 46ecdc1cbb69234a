"""What lenses gather from a store: activation vectors and firings of any rows, by name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore.errors import unknown_name
from actstore.store import StoreReader

__all__ = ["FiringsOfRows", "firings_of_rows", "must_have_sae", "vectors_of_rows"]


@dataclass(frozen=True, eq=False)
class FiringsOfRows:
    """The firings of some rows: counts int64 (row); features int64 and activations float32 (firing), row after row."""

    counts: npt.NDArray[np.int64]
    features: npt.NDArray[np.int64]
    activations: npt.NDArray[np.float32]


def vectors_of_rows(reader: StoreReader, site: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return activation vectors of a stored site: float32 (row, width).

    Raises UnknownName, listing what is stored, for a site that is not, and for rows that do not exist.
    """
    path = f"sites/{site}"
    if path not in reader.layout.artifacts:
        stored = [one.removeprefix("sites/") for one in reader.layout.artifacts if one.startswith("sites/")]
        next_step = f"add it: actstore extract MODEL --into STORE --site {site}"
        raise unknown_name("stored site", site, sorted(stored), next_step=next_step)
    return reader.gather(path, rows).astype(np.float32, copy=False)


def firings_of_rows(reader: StoreReader, sae: str, rows: npt.NDArray[np.int64]) -> FiringsOfRows:
    """Return the firings of an SAE on each row, by feature.

    Raises UnknownName, listing what is stored, for an SAE that is not, and for rows that do not exist.
    """
    must_have_sae(reader, sae)
    reader.token_column("seq", rows)  # raises for a row that does not exist
    shards, places = np.divmod(rows, reader.shard_rows)
    counts = np.zeros(len(rows), dtype=np.int64)
    found = []
    for shard in np.unique(shards):
        here = np.flatnonzero(shards == shard)
        firings = reader.firings_cached(sae, int(shard))
        starts, ends = firings.indptr[places[here]], firings.indptr[places[here] + 1]
        counts[here] = ends - starts
        picked = _ranges(starts, ends - starts)
        found.append((np.repeat(here, ends - starts), firings.features[picked], firings.activations[picked]))
    places_of_rows, features, activations = (
        np.concatenate(parts) for parts in (zip(*found, strict=True) if found else ([np.empty(0, int)],) * 3)
    )
    order = np.argsort(places_of_rows, kind="stable")
    return FiringsOfRows(counts, features[order].astype(np.int64), activations[order].astype(np.float32, copy=False))


def must_have_sae(reader: StoreReader, sae: str) -> None:
    """Raise UnknownName, listing what is stored, for an SAE that is not."""
    stored = [one.removeprefix("firings/") for one in reader.layout.artifacts if one.startswith("firings/")]
    if sae not in stored:
        next_step = "add it: actstore extract MODEL --into STORE --sae SOURCE"
        raise unknown_name("stored SAE", sae, sorted(stored), next_step=next_step)


def _ranges(starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return start, start + 1, … of each, one after the other."""
    before = np.cumsum(counts) - counts
    return np.asarray(np.arange(counts.sum()) + np.repeat(starts - before, counts))
