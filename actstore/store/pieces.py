"""The kit of a store for reading: pieces found by name, opened once, and read a few rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from actstore.errors import MissingInput, explain, unknown_name

from .gathering import ChunkCache
from .kit import open_piece
from .layout import Layout, PassFile
from .location import Location

__all__ = ["Kit"]


class Kit:
    """The kit pieces of one snapshot of a store; any thread may ask."""

    def __init__(self, location: Location, layout: Layout, passes: Mapping[str, PassFile], chunks: ChunkCache) -> None:
        self._location, self._layout, self._passes, self._chunks = location, layout, passes, chunks
        self._opened: dict[str, zarr.Group] = {}
        self._lock = threading.Lock()

    def digest(self, name: str, artifact: str | None = None) -> str:
        """Return the digest of a piece, such as `unembedding`: that of the pass that made an artifact, else of another.

        Another pass computed in another dtype perhaps, but with the same model. An SAE's weights are those of the pass
        that has its firings, and of no other: the id may have been another SAE's. Raises UnknownName where the artifact
        is not stored, MissingInput where no pass has such a piece.
        """
        if artifact is not None and artifact not in self._layout.artifacts:
            raise unknown_name("artifact", artifact, sorted(self._layout.artifacts))
        if having := self._having(name, artifact):
            return having[0].kit[name]
        made_by = f"the command (`actstore extract` or `encode`) that made {artifact or 'the store'}"
        raise MissingInput(
            explain(
                f"The kit of this store has no {name}",
                next_step=f"run {made_by} again, without --no-sae-weights: it adds what the kit lacks, and computes "
                "nothing twice",
            )
        )

    def has(self, name: str) -> bool:
        """Return whether there is a piece of this name."""
        return any(self._having(name, None))

    def _having(self, name: str, artifact: str | None) -> list[PassFile]:
        """Return the passes whose piece of this name may be read: that of the artifact first."""
        kind, _, sae = name.partition("/")
        owner = self._layout.artifacts.get(f"firings/{sae}" if kind == "sae" else artifact or "", "")
        others = () if kind == "sae" else self._passes
        return [self._passes[one] for one in (owner, *others) if one in self._passes and name in self._passes[one].kit]

    def piece(self, digest: str) -> zarr.Group:
        """Return the piece with this digest: its arrays and attributes; opened once."""
        with self._lock:
            if digest not in self._opened:
                self._opened[digest] = open_piece(self._location, digest)
            return self._opened[digest]

    def rows(self, digest: str, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return these rows of an array of a piece, in the order asked for, widened to float32: (row, …)."""
        array: Any = self.piece(digest)[name]
        found = self._chunks.gather(f"{digest}/{name}", array, rows, lambda span: np.asarray(array[span]))
        return found.astype(np.float32, copy=False)
