"""The unembedding in float32, a block of the vocabulary at a time: at Gemma's size it is 2.4 GB whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["WidenedWeight"]

TOKENS_PER_BLOCK = 8192
BLOCK_BYTES = 16 << 20  # widened; what is written and read again at once should stay in the processor's cache
KEPT_BYTES = 128 << 20  # widened; a weight no larger is read once
_UPPER_HALF = slice(1 if sys.byteorder == "little" else 0, None, 2)

Block = npt.NDArray[np.float32]


class WidenedWeight:
    """A matrix (token, width) of the kit, read in blocks; any thread may ask."""

    def __init__(self, weight: Any) -> None:
        """Take the array, float32 or bfloat16; it stays on the disk."""
        self._weight = weight
        self._is_bfloat16 = weight.dtype == np.dtype(ml_dtypes.bfloat16)

    def __iter__(self) -> Iterator[tuple[int, Block]]:
        """Yield (first token, float32 (token, width)); a block is overwritten after the next one is asked for."""
        n_tokens, width = self._weight.shape
        if n_tokens * width * 4 > KEPT_BYTES:
            yield from self._read_ahead()
        else:
            for first in range(0, n_tokens, self.tokens_per_block):
                yield first, self._whole[first : first + self.tokens_per_block]

    @cached_property
    def tokens_per_block(self) -> int:
        """The longest block; whole chunks where they fit into one, as a chunk is read and proved whole."""
        chunk, width = int(self._weight.chunks[0]), int(self._weight.shape[1])
        wanted = max(1, min(TOKENS_PER_BLOCK, BLOCK_BYTES // (4 * width)))
        return wanted // chunk * chunk or wanted

    @cached_property
    def _whole(self) -> Block:
        n_tokens, _ = self._weight.shape
        return self._read(0, self._new_block(n_tokens))

    def _read_ahead(self) -> Iterator[tuple[int, Block]]:
        """Yield blocks in two places by turns; while one is used, a thread reads and widens the next into the other."""
        places = self._new_block(self.tokens_per_block), self._new_block(self.tokens_per_block)
        firsts = range(0, self._weight.shape[0], self.tokens_per_block)
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(self._read, 0, places[0])
            for number, first in enumerate(firsts, start=1):
                block = coming.result()
                if number < len(firsts):
                    coming = reader.submit(self._read, firsts[number], places[number % 2])
                yield first, block

    def _new_block(self, n_tokens: int) -> Block:
        """Return a place for a block; of bfloat16 the lower halves are never written again."""
        return np.zeros((n_tokens, self._weight.shape[1]), dtype=np.float32)

    def _read(self, first: int, place: Block) -> Block:
        """Read as many tokens as there are and fit, and return the part of the place that they fill."""
        narrow = np.asarray(self._weight[first : first + len(place)])
        block = place[: len(narrow)]
        if self._is_bfloat16:  # by hand: a cast takes three times as long
            block.view(np.uint16)[:, _UPPER_HALF] = narrow.view(np.uint16)
        else:
            block[...] = narrow
        return block
