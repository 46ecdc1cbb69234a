"""The functions that SQL can call: each gathers from the store for a whole batch of rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.errors import InvalidInput, UnknownName, explain, unknown_name
from actstore.index import SqlFunction
from actstore.plain_arrow import integer_array, integers_of, text_array
from actstore.store import StoreReader

from .columns import by_name, in_one, in_order, lists_of, places_by_name, ragged
from .shares import ATTRIBUTION_TYPE
from .significance import t_test_p
from .snippets import places_of_rows, snippets
from .stored import firings_of_rows, vectors_of_rows

if TYPE_CHECKING:
    from .attribution import Prism
    from .directions import Directions
    from .unembed import TopTokens, Unembed
    from .unembeddings import Unembeddings

__all__ = ["Functions"]

FIRINGS_TYPE = pa.list_(pa.struct([("feature", pa.int32()), ("activation", pa.float32())]))
VECTOR_TYPE = pa.list_(pa.float32())
EDGES_TYPE = pa.list_(pa.struct([("head", pa.int32()), ("key_row", pa.int64()), ("weight", pa.float32())]))
LENS_TYPE = pa.list_(pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("logprob", pa.float32())]))


class Functions:
    """Every function of the SQL contract, over one snapshot of a store."""

    def __init__(self, reader: StoreReader) -> None:
        self.reader = reader

    # What most questions do without is imported when it is first asked for.

    @cached_property
    def unembeddings(self) -> Unembeddings:
        """The unembeddings of the store's passes."""
        from .unembeddings import Unembeddings

        return Unembeddings(self.reader)

    @cached_property
    def directions(self) -> Directions:
        """What the features of the store's SAEs write."""
        from .directions import Directions

        return Directions(self.reader)

    @cached_property
    def prism(self) -> Prism:
        """What each part of the model adds to a logit."""
        from .attribution import Prism

        return Prism(self.reader, self.directions, self.unembeddings)

    def all(self) -> Sequence[SqlFunction]:
        """Return every function, ready to be registered."""
        return (
            SqlFunction("act", self.act, ("VARCHAR", "BIGINT"), "FLOAT[]"),
            SqlFunction("feature_direction", self.feature_direction, ("VARCHAR", "INTEGER"), "FLOAT[]"),
            SqlFunction("unembed", self.unembed_rows, ("INTEGER",), "FLOAT[]"),
            SqlFunction("lens_logits", self.lens_logits, ("VARCHAR", "BIGINT", "INTEGER[]"), "FLOAT[]"),
            SqlFunction(
                "attribution",
                self.attribution,
                ("BIGINT", "INTEGER", "INTEGER", "VARCHAR"),
                "STRUCT(component VARCHAR, layer INTEGER, head INTEGER, feature INTEGER, contribution DOUBLE)[]",
                nulls="special",
            ),
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
            SqlFunction("token_at", self.token_at, ("BIGINT",), "STRUCT(doc BIGINT, pos INTEGER, token VARCHAR)"),
            SqlFunction("token_id", self.token_id, ("VARCHAR",), "INTEGER"),
            SqlFunction("t_test_p", t_test_p, ("DOUBLE", "DOUBLE"), "DOUBLE"),
        )

    def act(self, sites: pa.Array, rows: pa.Array) -> pa.Array:
        """Return the activation vector of each row at a stored site: FLOAT[] (width)."""
        return by_name(sites, rows, VECTOR_TYPE, lambda site, numbers: lists_of(self.vectors(site, numbers)))

    def feature_direction(self, saes: pa.Array, features: pa.Array) -> pa.Array:
        """Return what a feature writes into the residual stream: its decoder row, through W_O and a post-norm's gain.

        FLOAT[] (d_model). The scale of a post-norm is left out: it depends on the row.
        """

        def gather(sae: str, numbers: npt.NDArray[np.int64]) -> pa.Array:
            distinct, inverse = np.unique(numbers, return_inverse=True)
            return lists_of(self.directions.of_features(sae, distinct)[inverse])

        return by_name(saes, features, VECTOR_TYPE, gather)

    def unembed_rows(self, token_ids: pa.Array) -> pa.Array:
        """Return a token's row of the unembedding, as the model has it: without the final norm's gain."""
        return lists_of(self.unembeddings.token_rows(None, np.asarray(token_ids, dtype=np.int64)))

    def lens_logits(self, sites: pa.Array, rows: pa.Array, token_ids: pa.Array) -> pa.Array:
        """Return the logits, after the soft cap, of these tokens at a stored site of the residual stream."""
        lists = in_one(token_ids)
        if lists.flatten().null_count:
            raise InvalidInput(explain("A list of token ids has NULL in it", accepted="token ids"))
        gather = partial(self._logits, np.asarray(rows, np.int64), lists)
        return by_name(sites, pa.array(np.arange(len(rows))), VECTOR_TYPE, gather)

    def attribution(self, rows: pa.Array, token_ids: pa.Array, against: pa.Array, saes: pa.Array) -> pa.Array:
        """Return what each part of the model adds to a token's logit before the soft cap, or to a difference of logits.

        `against`: the other token's id, -1 for the mean of the vocabulary, NULL for none; `sae`: the SAE whose features
        are told apart, or NULL. Needs the last resid_post; tells apart what is stored.
        """
        places = np.flatnonzero(np.asarray(rows.is_valid()) & np.asarray(token_ids.is_valid()))
        columns = [column.take(pa.array(places)) for column in (rows, token_ids, against)]
        names = saes.take(pa.array(places)).fill_null("")

        def gather(sae: str, here: npt.NDArray[np.int64]) -> pa.Array:
            row, token, other = (column.take(pa.array(here)) for column in columns)
            return self.prism.contributions(row, token, other, sae or None)

        made = by_name(names, pa.array(np.arange(len(places))), ATTRIBUTION_TYPE, gather) if len(places) else None
        index = np.full(len(rows), -1)
        index[places] = np.arange(len(places))
        empty = pa.array([], ATTRIBUTION_TYPE)
        return (empty if made is None else made).take(pa.array(index, mask=index < 0))

    def firings(self, saes: pa.Array, rows: pa.Array) -> pa.Array:
        """Return the features that fire on each row, by feature, from the token-major firings."""
        return by_name(saes, rows, FIRINGS_TYPE, self._firings)

    def edges(self, layers: pa.Array, rows: pa.Array) -> pa.Array:
        """Return all stored edges of each row in a layer: by head, heaviest first, however light."""
        return by_name(layers, rows, EDGES_TYPE, self._edges)

    def logit_lens(self, sites: pa.Array, rows: pa.Array, ks: pa.Array) -> pa.Array:
        """Return the k likeliest tokens of each row at a stored site of the residual stream, likeliest first."""
        numbers_of_k = np.asarray(ks)
        places = [np.flatnonzero(numbers_of_k == k) for k in np.unique(numbers_of_k)]
        parts = [self._lens(sites.take(here), rows.take(here), int(numbers_of_k[here[0]])) for here in places]
        return in_order(parts, places, LENS_TYPE)

    def snippet(self, rows: pa.Array, before: pa.Array, after: pa.Array) -> pa.Array:
        """Return the text around each row's token, the token between « and »."""
        return text_array(snippets(self.reader, *map(integers_of, (rows, before, after))))

    def token_at(self, rows: pa.Array) -> pa.Array:
        """Return document, position and text of the token of each row: a join with tokens is for many rows."""
        docs, positions, texts = places_of_rows(self.reader, integers_of(rows))
        columns = [integer_array(docs), integer_array(positions), text_array(texts)]
        return pa.StructArray.from_arrays(columns, names=["doc", "pos", "token"])

    def token_id(self, texts: pa.Array) -> pa.Array:
        """Return the id of the token that is shown as each text.

        Raises UnknownName where no token, or more than one, is shown so.
        """
        chosen = {text: self._token_id(text) for text in texts.unique().to_pylist()}
        return pa.array([chosen[text] for text in texts.to_pylist()], pa.int32())

    def vectors(self, site: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return activation vectors: float32 (row, width).

        Raises UnknownName, listing what is stored, for a site that is not.
        """
        return vectors_of_rows(self.reader, site, rows)

    def _firings(self, sae: str, rows: npt.NDArray[np.int64]) -> pa.Array:
        found = firings_of_rows(self.reader, sae, rows)
        fields = [pa.array(found.features.astype(np.int32)), pa.array(found.activations)]
        return ragged(found.counts, pa.StructArray.from_arrays(fields, fields=list(FIRINGS_TYPE.value_type)))

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

    def _lens(self, sites: pa.Array, rows: pa.Array, k: int) -> pa.Array:
        """Return the k likeliest tokens; rows of all sites with one unembedding go through the vocabulary together."""
        numbers = np.asarray(rows, dtype=np.int64)
        together: dict[Unembed, list[tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]]] = {}
        for site, here in places_by_name(sites).items():
            vectors = self._residuals(site, numbers[here])
            together.setdefault(self.unembed(f"sites/{site}"), []).append((here, vectors))
        parts, places = [], []
        for unembed, found in together.items():
            places.append(np.concatenate([here for here, _ in found]))
            parts.append(self._lens_lists(unembed.top(np.concatenate([vectors for _, vectors in found]), k)))
        return in_order(parts, places, LENS_TYPE)

    def _lens_lists(self, top: TopTokens) -> pa.Array:
        n_rows, k = top.token_ids.shape
        token_ids = pa.array(top.token_ids.reshape(-1))
        texts = self.reader.vocabulary().take(token_ids).cast(pa.string())
        fields = [token_ids, texts, pa.array(top.logprobs.reshape(-1))]
        return ragged(np.full(n_rows, k), pa.StructArray.from_arrays(fields, fields=list(LENS_TYPE.value_type)))

    def _residuals(self, site: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        if not site.startswith("resid_"):  # others may be as wide: the numbers would mean nothing
            raise InvalidInput(
                explain(
                    f"A lens cannot read {site!r}: it is not the residual stream before the final norm",
                    accepted="resid_pre, resid_mid and resid_post",
                    next_step="for the model's own answer read the last resid_post",
                )
            )
        return self.vectors(site, rows)

    def _logits(
        self, rows: npt.NDArray[np.int64], token_ids: pa.Array, site: str, here: npt.NDArray[np.int64]
    ) -> pa.Array:
        """Return the logits of the lists `here` at one site, all their tokens together."""
        lists = token_ids.take(pa.array(here))
        counts, flat = np.asarray(lists.value_lengths(), np.int64), np.asarray(lists.flatten(), np.int64)
        vectors, artifact = self._residuals(site, rows[here]), f"sites/{site}"
        distinct, which = np.unique(flat, return_inverse=True)
        weights, of_row = self.unembeddings.token_rows(artifact, distinct), np.repeat(np.arange(len(here)), counts)
        return ragged(counts, pa.array(self.unembed(artifact).logits_of(vectors, weights, of_row, which)))

    def unembed(self, artifact: str) -> Unembed:
        """Return the unembedding of the pass that made an artifact, in that pass's dtype; opened once."""
        return self.unembeddings.of(artifact)

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
