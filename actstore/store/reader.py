"""Reading a store: a snapshot of what has receipts; satisfies what the index is built from (docs/format.md §3–§6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr

from actstore.blocks import TOKEN_FIELDS, RowFirings, Segment, artifact_of
from actstore.errors import MissingInput, UnknownName, explain, unknown_name
from actstore.sealed import digest_of

from .csr import decode_firings
from .documents import SegmentReader
from .feature_files import Logits, read_feature_logits, read_labels
from .files import ARRAYS, STORE_FILE, firings_file, metadata_file, pass_file
from .gathering import ChunkCache
from .kit import open_piece, unpack_texts
from .layout import CORPUS_PASS, PassFile, StoreFile
from .location import Location
from .pieces import Kit
from .proved import Files, damaged, decoded, read_file, read_rows
from .receipts import load_corpus, load_layout, load_receipts
from .tables import sae_rows, site_rows, small_tables

__all__ = ["StoreReader"]

FIRING_SHARDS_CACHED = 16
DOCUMENTS_CACHED = 128
TOKEN_BYTES, TEXT_BYTES = 192 << 20, 64 << 20  # decoded, kept for rows and documents that are asked for one by one


class StoreReader:
    """One snapshot of a store; what is added later needs a new reader."""

    def __init__(self, store: str | Path) -> None:
        """Open a store by path or fsspec URL.

        Raises MissingInput where there is none, UnsupportedFormat for a newer format, CorruptStore for damage.
        """
        self.location = Location.of(store)
        try:
            body = self.location.read_sealed(STORE_FILE)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise MissingInput(
                explain(
                    f"There is no store at {str(store)!r}",
                    accepted="a directory or URL that `actstore extract … --out` made",
                    next_step="check the path, or make a store: actstore demo demo.act",
                )
            ) from error
        self.store = StoreFile.from_json(body, f"{store}/{STORE_FILE}")
        self.layout = load_layout(self.location)
        self.shard_rows = self.store.shard_rows
        # Caches belong to one reader and go with it.
        self.firings_cached = lru_cache(FIRING_SHARDS_CACHED)(self.firings)
        self.array = lru_cache(None)(self._array)
        self._digests = lru_cache(None)(self._receipt_digests)
        self.document_text = lru_cache(DOCUMENTS_CACHED)(self._document_text)
        self._chunks = ChunkCache()
        # Of their own: activation vectors would push out what every snippet needs.
        self._token_chunks, self._text_chunks = ChunkCache(TOKEN_BYTES), ChunkCache(TEXT_BYTES)

    # What is there

    @cached_property
    def passes(self) -> dict[str, PassFile]:
        """Every pass by its id."""
        return {one: PassFile.from_json(self._sealed(pass_file(one)), pass_file(one)) for one in self.layout.passes}

    def _sealed(self, name: str) -> dict[str, Any]:
        """Return a sealed file that must be there."""
        try:
            return self.location.read_sealed(name)
        except FileNotFoundError as error:
            raise damaged(name, "it is missing") from error

    @cached_property
    def receipts(self) -> dict[str, dict[int, Mapping[str, Any]]]:
        """Receipts of every pass, by shard: what this snapshot knows to be durable."""
        return {one: load_receipts(self.location, self.layout, one) for one in self.layout.passes}

    @cached_property
    def corpus_manifests(self) -> list[dict[str, Any]]:
        """The sealed manifest of every segment."""
        return load_corpus(self.location, self.layout, self.shard_rows)

    @cached_property
    def rows_used(self) -> npt.NDArray[np.int64]:
        """Rows in use of every shard: int64 (shard)."""
        return np.array([n for manifest in self.corpus_manifests for n in manifest["rows_used"]], dtype=np.int64)

    def done(self, artifact: str) -> dict[int, str]:
        """Return the shards of an artifact that have receipts, each with its receipt's digest."""
        owner = self.layout.artifacts.get(artifact)
        return {} if owner is None else self._digests(owner)

    def _receipt_digests(self, pass_id: str) -> dict[int, str]:
        if pass_id == CORPUS_PASS:
            digests = [digest_of(manifest) for manifest in self.corpus_manifests]
            return {
                shard: digest
                for segment, digest in zip(self.layout.segments, digests, strict=True)
                for shard in range(segment.first_shard, segment.first_shard + segment.n_shards)
            }
        return {shard: digest_of(dict(one)) for shard, one in self.receipts[pass_id].items()}

    def segments(self) -> Sequence[Segment]:
        """Return the segments in order."""
        return self.layout.segments

    @cached_property
    def sites(self) -> list[dict[str, Any]]:
        """The stored sites, as rows of the table `sites`."""
        return site_rows(self.layout, self.passes)

    @cached_property
    def saes(self) -> list[dict[str, Any]]:
        """The stored SAEs, as rows of the table `saes`."""
        return sae_rows(self.layout, self.passes)

    # Values

    def matrix(self, path: str, shard: int) -> npt.NDArray[Any]:
        """Return the rows in use of one shard of a matrix: (row, column), in its stored dtype; of int8 float32.

        Raises UnknownName where the shard was not extracted, CorruptStore where its file is missing or damaged.
        """
        self._must_be_done(artifact_of(path), shard)
        first = shard * self.shard_rows
        rows = slice(first, first + int(self.rows_used[shard]))
        return decoded(path, partial(self._read, rows=rows))

    def _read(self, path: str, rows: slice) -> npt.NDArray[Any]:
        """Return rows of a matrix, filler included, of shards that are stored."""
        shards = range(rows.start // self.shard_rows, -(-rows.stop // self.shard_rows))
        files = {name: proof for shard in shards for name, proof in self._files(artifact_of(path), shard).items()}
        return read_rows(self.location, self.array(path), path, rows, files)

    def _files(self, artifact: str, shard: int) -> Files:
        """Return the files that the receipt of a shard proves."""
        owner = self.layout.artifacts[artifact]
        if owner == CORPUS_PASS:
            files: Files = self.corpus_manifests[self.layout.segment_of(shard).segment]["files"]
        else:
            files = self.receipts[owner][shard]["files"]
        return files

    def _array(self, path: str) -> zarr.Array[Any]:
        try:
            return self.location.zarr_array(f"{ARRAYS}/{path}")
        except Exception as error:  # damaged metadata surfaces in zarr as errors of many kinds
            raise damaged(metadata_file(path), str(error)) from error

    def _must_be_done(self, artifact: str, shard: int) -> None:
        owner = self.layout.artifacts.get(artifact)
        if owner is None:
            known = sorted(self.layout.artifacts)
            raise unknown_name("artifact", artifact, known, next_step="add it: actstore extract … --into STORE")
        if not 0 <= shard < self.layout.n_shards or (owner != CORPUS_PASS and shard not in self.receipts[owner]):
            raise UnknownName(
                explain(
                    f"Shard {shard} of {artifact} is not stored",
                    accepted=f"one of the {len(self.done(artifact))} of {self.layout.n_shards} shards that are done",
                    next_step="finish the extraction: run the same `actstore extract` command again",
                )
            )

    def gather(self, path: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return these rows of a matrix, in the order asked for: (row, column), in its stored dtype; of int8 float32.

        Each chunk is decoded once, and kept a while. Raises UnknownName for rows that do not exist, are filler or were
        not extracted.
        """
        rows = np.asarray(rows, dtype=np.int64)
        self._must_be_rows(rows)
        for shard in np.flatnonzero(np.bincount(rows // self.shard_rows)):
            self._must_be_done(artifact_of(path), int(shard))
        return decoded(path, lambda one: self._chunks.gather(one, self.array(one), rows, partial(self._read, one)))

    def _must_be_rows(self, rows: npt.NDArray[np.int64]) -> None:
        shards, offsets = np.divmod(rows, self.shard_rows)
        inside = (rows >= 0) & (shards < self.layout.n_shards)
        inside[inside] = offsets[inside] < self.rows_used[shards[inside]]
        if not inside.all():
            raise UnknownName(
                explain(
                    f"There is no row {int(rows[~inside][0])}",
                    accepted=f"the rows of `tokens` ({self.layout.n_rows} in {self.layout.n_shards} shards)",
                    next_step="look it up: SELECT min(row), max(row) FROM tokens",
                )
            )

    def tokens(self, shard: int) -> npt.NDArray[np.int32]:
        """Return the token fields of one shard's rows in use: int32 (row, field), the fields as in TOKEN_FIELDS."""
        return np.asarray(self.matrix("corpus/tokens", shard), dtype=np.int32)

    def token_rows(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return the tokens of these rows, in the order asked for: int32 (row, field) with the fields `TOKEN_FIELDS`.

        Raises UnknownName for rows that do not exist.
        """
        rows = np.asarray(rows, dtype=np.int64)
        self._must_be_rows(rows)
        path = "corpus/tokens"
        return self._token_chunks.gather(path, self.array(path), rows, partial(self._read, path))

    def token_column(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return one field of `corpus/tokens` for these rows: int32 (row)."""
        return self.token_rows(rows)[:, TOKEN_FIELDS.index(name)]

    def firings(self, sae: str, shard: int) -> RowFirings:
        """Return the firings of one shard of an SAE, over all rows of the shard; filler rows have none."""
        self._must_be_done(f"firings/{sae}", shard)
        name = firings_file(sae, shard)
        return decode_firings(read_file(self.location, name, self._files(f"firings/{sae}", shard)), name)

    def sequences(self, segment: int) -> npt.NDArray[np.int64]:
        """Return doc, first row and n_tokens of every sequence of a segment: int64 (seq, 3)."""
        return self._segments[segment].sequences()

    def documents(self, segment: int) -> Iterator[pa.RecordBatch]:
        """Yield the documents of a segment, a few thousand at a time."""
        return self._segments[segment].documents()

    @cached_property
    def _segments(self) -> list[SegmentReader]:
        together = zip(self.layout.segments, self.corpus_manifests, strict=True)
        where = (self.location, self.array, self._text_chunks)
        return [SegmentReader(one, *where, manifest["files"]) for one, manifest in together]

    def sequences_of(self, seqs: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return doc, first row and n_tokens of these sequences, in the order asked for: int64 (sequence, 3)."""
        out = np.empty((len(seqs), 3), dtype=np.int64)
        for segment in self.layout.segments:
            here = (seqs >= segment.first_seq) & (seqs < segment.first_seq + segment.n_seqs)
            if here.any():
                out[here] = self._segments[segment.segment].held_sequences[seqs[here] - segment.first_seq]
        return out

    def documents_of(self, seqs: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
        """Return the document of each sequence: int64 (sequence)."""
        return self.sequences_of(seqs)[:, 0]

    def _document_text(self, doc: int) -> str:
        """Return the text of one document; raises UnknownName where there is none of this number."""
        for segment in self.layout.segments:
            if 0 <= doc - segment.first_doc < segment.n_docs:
                return self._segments[segment.segment].text(doc)
        raise UnknownName(explain(f"There is no document {doc}", accepted=f"documents 0 to {self.layout.n_docs - 1}"))

    # Kit and tables

    @cached_property
    def _vocabulary(self) -> pa.Array:
        piece = open_piece(self.location, self.store.vocabulary)
        return unpack_texts(np.asarray(piece["text"]), np.asarray(piece["bounds"]))

    def vocabulary(self) -> pa.Array:
        """Return the display text of every token id: Arrow large_string (token)."""
        return self._vocabulary

    @cached_property
    def kit(self) -> Kit:
        """The kit's pieces."""
        return Kit(self.location, self.layout, self.passes, self._chunks)

    def kit_digest(self, name: str, artifact: str | None = None) -> str:
        """Return as `Kit.digest`."""
        return self.kit.digest(name, artifact)

    def kit_piece(self, digest: str) -> zarr.Group:
        """Return the kit piece with this digest: its arrays and attributes."""
        return self.kit.piece(digest)

    def feature_logits(self, sae: str) -> Logits | None:
        """Return token ids and logits (feature, rank) of an SAE, or None where they were not computed."""
        owner = self.layout.artifacts.get(f"firings/{sae}")
        return None if owner is None else read_feature_logits(self.location, self.passes[owner], sae)

    def labels(self) -> list[tuple[str, int, str]]:
        """Return sae, feature and label of every feature that was named."""
        return read_labels(self.location)

    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """Return the small tables of the SQL contract, as rows."""
        return small_tables(self.store, self.layout, self.passes, self.receipts, self.corpus_manifests)
