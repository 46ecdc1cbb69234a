"""The unembeddings of a store's passes: they are of one model, and differ where passes computed in another dtype."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from actstore.errors import UnknownName, explain
from actstore.store import StoreReader

from .unembed import Unembed

__all__ = ["Unembeddings"]

UNEMBEDDING = "unembedding"


class Unembeddings:
    """Opens the unembedding of the pass that made an artifact, once; any thread may ask."""

    def __init__(self, reader: StoreReader) -> None:
        self._reader = reader
        self._loading = threading.Lock()  # DuckDB calls from several threads
        self._opened: dict[str, Unembed] = {}

    def of(self, artifact: str | None) -> Unembed:
        """Return the unembedding of the pass that made an artifact, in that pass's dtype; for None the first pass's."""
        digest = self._reader.kit_digest(UNEMBEDDING, artifact)
        with self._loading:
            if digest not in self._opened:
                self._opened[digest] = Unembed(self._reader.kit_piece(digest))
            return self._opened[digest]

    def token_rows(self, artifact: str | None, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return tokens' rows of it: float32 (token, d_model); raises UnknownName for ids not in the vocabulary."""
        last = self.of(artifact).vocabulary_size - 1
        wrong = token_ids[(token_ids < 0) | (token_ids > last)]
        if len(wrong):
            raise UnknownName(
                explain(
                    f"There is no token {wrong[0]}", accepted=f"0 to {last}", next_step="see the table `vocabulary`"
                )
            )
        return self._reader.kit.rows(self._reader.kit_digest(UNEMBEDDING, artifact), "weight", token_ids)
