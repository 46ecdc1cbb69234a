"""What an index is built from: the truth, as the index sees it.

The store satisfies `Source`; nothing here knows how the truth lies on the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.blocks import RowFirings

__all__ = ["Segment", "Source", "row_numbers"]


class Segment(Protocol):
    """A batch of documents added together: its ranges of documents, sequences and shards."""

    @property
    def segment(self) -> int: ...
    @property
    def first_doc(self) -> int: ...
    @property
    def n_docs(self) -> int: ...
    @property
    def first_seq(self) -> int: ...
    @property
    def n_seqs(self) -> int: ...
    @property
    def first_shard(self) -> int: ...
    @property
    def n_shards(self) -> int: ...


class Source(Protocol):
    """The truth that an index is derived from."""

    @property
    def shard_rows(self) -> int:
        """Rows of a shard, filler included."""

    def tables(self) -> Mapping[str, list[dict[str, Any]]]:
        """Return the small tables as rows: `schema.SMALL_TABLES`, and what else there is.

        That is `lenses` (lens, site), `attention` (layer, minimum: the least weight of an edge), `roles` (code, role).
        """

    def vocabulary(self) -> pa.Array:
        """Return the display text of every token: string (token_id)."""

    def segments(self) -> Sequence[Segment]:
        """Return every segment, in order."""

    def documents(self, segment: int) -> Iterator[pa.RecordBatch]:
        """Yield doc int64, segment int32, text, n_tokens int64, metadata (JSON text), parent int64, variant text."""

    def sequences(self, segment: int) -> npt.NDArray[np.int64]:
        """Return doc, row, n_tokens of a segment's sequences: int64 (seq − first_seq, 3)."""

    def done(self, artifact: str) -> Mapping[int, str]:
        """Return by shard the digest of the receipt that covers `artifact`.

        Artifacts are `corpus/tokens`, `predictions`, `firings/<sae>`, `lens/<lens>/<site>` and `attention/<layer>`.
        """

    def matrix(self, path: str, shard: int) -> npt.NDArray[Any]:
        """Return the rows in use of one shard of a matrix: (row, column), of attention (row, head, column)."""

    def firings(self, sae: str, shard: int) -> RowFirings:
        """Return one shard's firings; filler rows, if present, are empty."""

    def feature_logits(self, sae: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]] | None:
        """Return token ids and logits, each (feature, rank), or None where they were not computed.

        The first half of the ranks holds the highest logits, falling; the second half the lowest, rising.
        """

    def labels(self) -> Iterable[tuple[str, int, str]]:
        """Return (sae, feature, label) of every labelled feature."""


def row_numbers(source: Source, shard: int, n_rows: int) -> npt.NDArray[np.int64]:
    """Return the numbers of the first `n_rows` rows of a shard: int64 (row)."""
    return shard * source.shard_rows + np.arange(n_rows, dtype=np.int64)
