"""The functions that SQL can call: each gathers from the store for a whole batch of rows at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actstore.errors import InvalidInput, UnknownName, explain, unknown_name
from actstore.index import SqlFunction
from actstore.store import StoreReader

from .snippets import snippets
from .unembed import Unembed

__all__ = ["Functions"]

FIRINGS_TYPE = pa.list_(pa.struct([("feature", pa.int32()), ("activation", pa.float32())]))
EDGES_TYPE = pa.list_(pa.struct([("head", pa.int32()), ("key_row", pa.int64()), ("weight", pa.float32())]))
LENS_TYPE = pa.list_(pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("logprob", pa.float32())]))


class Functions:
    """`act`, `firings`, `edges`, `logit_lens`, `snippet` and `token_id` over one snapshot of a store."""

    def __init__(self, reader: StoreReader) -> None:
        self.reader = reader
        self._loading = threading.Lock()  # DuckDB calls from several threads
        self._unembeds: dict[str, Unembed] = {}

    def all(self) -> Sequence[SqlFunction]:
        """Return every function, ready to be registered."""
        return (
            SqlFunction("act", self.act, ("VARCHAR", "BIGINT"), "FLOAT[]"),
            SqlFunction("firings", self.firings, ("VARCHAR", "BIGINT"), "STRUCT(feature INTEGER, activation FLOAT)[]"),
            SqlFunction(
                "edges",
                self.edges,
                ("INTEGER", "BIGINT"),
                "STRUCT(head INTEGER, key_row BIGINT, weight FLOAT)[]",
            ),
            SqlFunction(
                "logit_lens",
                self.logit_lens,
                ("VARCHAR", "BIGINT", "INTEGER"),
                "STRUCT(token_id INTEGER, token VARCHAR, logprob FLOAT)[]",
            ),
            SqlFunction("snippet", self.snippet, ("BIGINT", "INTEGER", "INTEGER"), "VARCHAR"),
            SqlFunction("token_id", self.token_id, ("VARCHAR",), "INTEGER"),
        )

    def act(self, sites: pa.Array, rows: pa.Array) -> pa.Array:
        """Return the activation vector of each row at a stored site: FLOAT[] (width)."""
        return _by_name(sites, rows, pa.list_(pa.float32()), lambda site, numbers: _lists(self.vectors(site, numbers)))

    def firings(self, saes: pa.Array, rows: pa.Array) -> pa.Array:
        """Return the features that fire on each row, by feature, from the token-major firings."""
        return _by_name(saes, rows, FIRINGS_TYPE, self._firings)

    def edges(self, layers: pa.Array, rows: pa.Array) -> pa.Array:
        """Return all stored edges of each row in a layer: by head, heaviest first, however light."""
        return _by_name(layers, rows, EDGES_TYPE, self._edges)

    def logit_lens(self, sites: pa.Array, rows: pa.Array, ks: pa.Array) -> pa.Array:
        """Return the k likeliest tokens of each row at a stored site of the residual stream, likeliest first."""
        numbers_of_k = np.asarray(ks)
        parts, places = [], []
        for k in np.unique(numbers_of_k):
            here = np.flatnonzero(numbers_of_k == k)
            places.append(here)
            parts.append(
                _by_name(
                    sites.take(pa.array(here)),
                    rows.take(pa.array(here)),
                    LENS_TYPE,
                    lambda site, numbers, k=int(k): self._lens(site, numbers, k),
                )
            )
        return _in_order(parts, places, LENS_TYPE)

    def snippet(self, rows: pa.Array, before: pa.Array, after: pa.Array) -> pa.Array:
        """Return the text around each row's token, the token between « and »."""
        numbers = (np.asarray(column, dtype=np.int64) for column in (rows, before, after))
        return pa.array(snippets(self.reader, *numbers), pa.string())

    def token_id(self, texts: pa.Array) -> pa.Array:
        """Return the id of the token that is shown as each text.

        Raises UnknownName where no token, or more than one, is shown so.
        """
        chosen = {text: self._token_id(text) for text in pc.unique(texts).to_pylist()}
        return pa.array([chosen[text] for text in texts.to_pylist()], pa.int32())

    def vectors(self, site: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return activation vectors: float32 (row, width).

        Raises UnknownName, listing what is stored, for a site that is not.
        """
        path = f"sites/{site}"
        if path not in self.reader.layout.artifacts:
            stored = [one.removeprefix("sites/") for one in self.reader.layout.artifacts if one.startswith("sites/")]
            next_step = f"add it: actstore extract MODEL --into STORE --site {site}"
            raise unknown_name("stored site", site, sorted(stored), next_step=next_step)
        return self.reader.gather(path, rows).astype(np.float32)

    def _firings(self, sae: str, rows: npt.NDArray[np.int64]) -> pa.Array:
        self._must_have_sae(sae)
        self.reader.token_column("seq", rows)  # raises for a row that does not exist
        shards, places = np.divmod(rows, self.reader.shard_rows)
        parts, orders = [], []
        for shard in np.unique(shards):
            here = np.flatnonzero(shards == shard)
            orders.append(here)
            parts.append(_slices(self.reader.firings_cached(sae, int(shard)), places[here]))
        return _in_order(parts, orders, FIRINGS_TYPE)

    def _edges(self, layer: int, rows: npt.NDArray[np.int64]) -> pa.Array:
        known = [one.removeprefix("attention/") for one in self.reader.layout.artifacts if one.startswith("attention/")]
        if str(layer) not in known:
            next_step = "add it: actstore extract MODEL --into STORE --attention-top K"
            raise unknown_name("layer of stored attention", str(layer), sorted(known, key=int), next_step=next_step)
        weights = self.reader.gather(f"attention/{layer}/weights", rows)
        offsets = self.reader.gather(f"attention/{layer}/offsets", rows)
        places, heads, ranks = np.nonzero(offsets >= 0)
        fields = [
            pa.array(heads.astype(np.int32)),
            pa.array(rows[places] - offsets[places, heads, ranks]),
            pa.array(weights[places, heads, ranks]),
        ]
        values = pa.StructArray.from_arrays(fields, fields=list(EDGES_TYPE.value_type))
        bounds = np.searchsorted(places, np.arange(len(rows) + 1)).astype(np.int32)
        return pa.ListArray.from_arrays(bounds, values)

    def _must_have_sae(self, sae: str) -> None:
        stored = [one.removeprefix("firings/") for one in self.reader.layout.artifacts if one.startswith("firings/")]
        if sae not in stored:
            next_step = "add it: actstore extract MODEL --into STORE --sae SOURCE"
            raise unknown_name("stored SAE", sae, sorted(stored), next_step=next_step)

    def _lens(self, site: str, rows: npt.NDArray[np.int64], k: int) -> pa.Array:
        if not site.startswith("resid_"):  # others may be as wide: the numbers would mean nothing
            raise InvalidInput(
                explain(
                    f"A lens cannot read {site!r}: it is not the residual stream before the final norm",
                    accepted="resid_pre, resid_mid and resid_post",
                    next_step="for the model's own answer read the last resid_post",
                )
            )
        vectors = self.vectors(site, rows)
        top = self.unembed(f"sites/{site}").top(vectors, k)
        token_ids = pa.array(top.token_ids.reshape(-1))
        fields = [token_ids, self.reader.vocabulary().take(token_ids).cast(pa.string()), top.logprobs.reshape(-1)]
        values = pa.StructArray.from_arrays(
            [fields[0], fields[1], pa.array(fields[2])], fields=list(LENS_TYPE.value_type)
        )
        return pa.ListArray.from_arrays(np.arange(len(rows) + 1, dtype=np.int32) * k, values)

    def unembed(self, artifact: str) -> Unembed:
        """Return the unembedding of the pass that made an artifact, in that pass's dtype; opened once."""
        digest = self.reader.kit_digest("unembedding", artifact)
        with self._loading:
            if digest not in self._unembeds:
                self._unembeds[digest] = Unembed(self.reader.kit_piece(digest))
            return self._unembeds[digest]

    @cached_property
    def _ids_of(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, text in enumerate(self.reader.vocabulary().to_pylist()):
            found.setdefault(text, []).append(number)
        return found

    def _token_id(self, text: str) -> int:
        ids = self._ids_of.get(text, [])
        if len(ids) > 1:
            what = f"{text!r} is how {len(ids)} tokens are shown: ids {', '.join(map(str, ids[:8]))}"
            raise UnknownName(explain(what, next_step="use the id itself"))
        if not ids:
            near = [one for one in (f" {text}", text.strip(), text.capitalize()) if one in self._ids_of]
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise UnknownName(
                explain(f"No single token is shown as {text!r}.{hint}", next_step="see the table `vocabulary`")
            )
        return ids[0]


def _by_name(names: pa.Array, rows: pa.Array, kind: pa.DataType, gather: Any) -> pa.Array:
    """Call `gather(name, rows)` once for each distinct name, and put the answers back in order."""
    distinct = pc.unique(names).to_pylist()
    numbers = np.asarray(rows, dtype=np.int64)
    if len(distinct) == 1:
        return gather(distinct[0], numbers)
    places = [np.flatnonzero(np.asarray(pc.equal(names, name))) for name in distinct]
    parts = [gather(name, numbers[here]) for name, here in zip(distinct, places, strict=True)]
    return _in_order(parts, places, kind)


def _in_order(parts: Sequence[pa.Array], places: Sequence[npt.NDArray[np.intp]], kind: pa.DataType) -> pa.Array:
    """Return the parts as one array, each element at its place."""
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(np.concatenate([*places, np.empty(0, np.intp)]), kind="stable")
    return pa.concat_arrays([*parts, pa.array([], kind)]).take(pa.array(order))


def _lists(vectors: npt.NDArray[np.float32]) -> pa.Array:
    n_rows, width = vectors.shape
    return pa.ListArray.from_arrays(np.arange(n_rows + 1, dtype=np.int32) * width, pa.array(vectors.reshape(-1)))


def _slices(firings: Any, places: npt.NDArray[np.int64]) -> pa.Array:
    """Return the firings of some rows of a shard as lists."""
    starts, ends = firings.indptr[places], firings.indptr[places + 1]
    bounds = np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int32)
    picked = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], ends - starts)
    values = pa.StructArray.from_arrays(
        [pa.array(firings.features[picked].astype(np.int32)), pa.array(firings.activations[picked])],
        fields=list(FIRINGS_TYPE.value_type),
    )
    return pa.ListArray.from_arrays(bounds, values)
