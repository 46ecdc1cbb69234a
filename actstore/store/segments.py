"""What a segment is made of: its arrays, and how documents become rows of them (docs/format.md §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from actstore.blocks import TOKEN_FIELDS, MatrixSpec, TokenShard

from .growing import GrowingArray, GrowingSpec

__all__ = ["SEGMENT_ARRAYS", "TOKENS", "CorpusPart", "append_part"]

TOKENS = MatrixSpec("corpus/tokens", len(TOKEN_FIELDS), "int32", "field", TOKEN_FIELDS, per_column_chunks=True)
DOCUMENT_FIELDS = ("text_start", "text_end", "metadata_start", "metadata_end", "n_tokens", "n_replaced")
SEQUENCE_FIELDS = ("doc", "row", "n_tokens")
SEGMENT_ARRAYS = (
    GrowingSpec("documents", "int64", ("doc", "field"), DOCUMENT_FIELDS),
    GrowingSpec("sequences", "int64", ("seq", "field"), SEQUENCE_FIELDS),
    GrowingSpec("text", "uint8", ("byte",)),
    GrowingSpec("metadata", "uint8", ("byte",)),
)


class DocumentPart(Protocol):
    """One document as it is stored; metadata is the JSON text of one object."""

    @property
    def text(self) -> str: ...
    @property
    def metadata(self) -> str: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def n_replaced(self) -> int: ...


class CorpusPart(Protocol):
    """Documents, sequences and finished shards, in order; what the corpus room yields."""

    @property
    def documents(self) -> Sequence[DocumentPart]: ...
    @property
    def sequences(self) -> npt.NDArray[np.int64]: ...
    @property
    def shards(self) -> Sequence[TokenShard]: ...


def append_part(growing: Mapping[str, GrowingArray], part: CorpusPart) -> None:
    """Append the documents and sequences of a part to their arrays."""
    columns = [
        *_append_texts(growing["text"], [document.text for document in part.documents]),
        *_append_texts(growing["metadata"], [document.metadata for document in part.documents]),
        np.array([document.n_tokens for document in part.documents], dtype=np.int64),
        np.array([document.n_replaced for document in part.documents], dtype=np.int64),
    ]
    growing["documents"].append(np.stack(columns, axis=1))
    growing["sequences"].append(part.sequences)


def _append_texts(array: GrowingArray, texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Append texts as UTF-8 and return where each starts and ends, in bytes."""
    encoded = [text.encode() for text in texts]
    lengths = np.array([len(text) for text in encoded], dtype=np.int64)
    ends = len(array) + np.cumsum(lengths)
    array.append(np.frombuffer(b"".join(encoded), dtype=np.uint8))
    return ends - lengths, ends
