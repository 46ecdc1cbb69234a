"""Firings row by row, a shard at a time, and their reduction to documents.

A document's rows are consecutive and may go on in the next shard, so the last document of a shard is held back and
joined with what follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.blocks import TOKEN_FIELDS, is_plain
from actstore.store import StoreReader

__all__ = ["REDUCTIONS", "SparseRows", "document_rows", "token_rows"]

REDUCTIONS = ("sum", "mean", "max", "count")


@dataclass(frozen=True)
class SparseRows:
    """Consecutive rows of a CSR matrix, as their numbers, what each weighs in a mean, and their firings.

    numbers int64 (row): row of the store, or document; n_plain int64 (row); counts int64 (row): firings of each;
    features int64 (firing), increasing in a row; values float32 or float64 (firing).
    """

    numbers: npt.NDArray[np.int64]
    n_plain: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    features: npt.NDArray[Any]
    values: npt.NDArray[Any]


def token_rows(reader: StoreReader, sae: str) -> Iterator[SparseRows]:
    """Yield the rows in use of every shard that is stored, with their firings."""
    for shard in sorted(reader.done(f"firings/{sae}")):
        used = int(reader.rows_used[shard])
        firings = reader.firings(sae, shard)
        numbers = shard * reader.shard_rows + np.arange(used, dtype=np.int64)
        counts = np.diff(firings.indptr)[:used]
        yield SparseRows(numbers, _plain(reader, shard).astype(np.int64), counts, firings.features, firings.activations)


def _plain(reader: StoreReader, shard: int) -> npt.NDArray[np.bool_]:
    return is_plain(reader.matrix("corpus/tokens", shard)[:, TOKEN_FIELDS.index("flags")])


def document_rows(reader: StoreReader, sae: str, reduce: str) -> Iterator[SparseRows]:
    """Yield every document of the store, those without rows too: a feature's firings on plain rows, reduced."""
    held, first = _Groups.empty(), 0
    for rows in token_rows(reader, sae):
        docs = _documents(reader, rows.numbers)
        held = held.joined(_grouped(rows, docs), reduce)
        last = int(docs[-1]) if len(docs) else first
        yield held.rows(first, last, reduce)
        held, first = held.since(last), last
    yield held.rows(first, reader.layout.n_docs, reduce)


def _documents(reader: StoreReader, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return reader.documents_of(reader.token_column("seq", rows).astype(np.int64))


@dataclass(frozen=True)
class _Groups:
    """Firings by (document, feature), increasing, and the plain rows of each document.

    docs, features int64, values float64 (firing); owners, n_plain int64 (document), owners increasing.
    """

    docs: npt.NDArray[np.int64]
    features: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    owners: npt.NDArray[np.int64]
    n_plain: npt.NDArray[np.int64]

    @classmethod
    def empty(cls) -> _Groups:
        nothing = np.empty(0, np.int64)
        return cls(nothing, nothing, np.empty(0), nothing, nothing)

    def joined(self, other: _Groups, reduce: str) -> _Groups:
        """Return both, with the firings of one document and feature reduced to one, and its rows counted together."""
        docs, features = np.concatenate([self.docs, other.docs]), np.concatenate([self.features, other.features])
        values = np.concatenate([self.values, other.values if reduce != "count" else np.ones(len(other.values))])
        order = np.lexsort((features, docs))
        docs, features, values = docs[order], features[order], values[order]
        starts = np.flatnonzero(np.r_[True, (np.diff(docs) != 0) | (np.diff(features) != 0)][: len(docs)])
        reducer = np.maximum if reduce == "max" else np.add
        reduced = reducer.reduceat(values, starts) if len(starts) else values
        owners, which = np.unique(np.concatenate([self.owners, other.owners]), return_inverse=True)
        n_plain = np.bincount(which, np.concatenate([self.n_plain, other.n_plain]), len(owners)).astype(np.int64)
        return _Groups(docs[starts], features[starts], reduced, owners, n_plain)

    def since(self, doc: int) -> _Groups:
        """Return what belongs to this document and those after it."""
        here, own = self.docs >= doc, self.owners >= doc
        return _Groups(self.docs[here], self.features[here], self.values[here], self.owners[own], self.n_plain[own])

    def rows(self, first: int, end: int, reduce: str) -> SparseRows:
        """Return the documents [first, end) as rows."""
        numbers = np.arange(first, end, dtype=np.int64)
        n_plain = np.zeros(len(numbers), np.int64)
        own = self.owners < end
        n_plain[self.owners[own] - first] = self.n_plain[own]
        here = self.docs < end
        places = self.docs[here] - first
        values = self.values[here] / n_plain[places] if reduce == "mean" else self.values[here]
        return SparseRows(numbers, n_plain, np.bincount(places, minlength=len(numbers)), self.features[here], values)


def _grouped(rows: SparseRows, docs: npt.NDArray[np.int64]) -> _Groups:
    """Return the firings on plain rows with the document of each, not yet reduced."""
    plain = np.repeat(rows.n_plain > 0, rows.counts)
    owners, which = np.unique(docs, return_inverse=True)
    n_plain = np.bincount(which, rows.n_plain, len(owners)).astype(np.int64)
    values = rows.values[plain].astype(np.float64)
    return _Groups(np.repeat(docs, rows.counts)[plain], rows.features[plain].astype(np.int64), values, owners, n_plain)
