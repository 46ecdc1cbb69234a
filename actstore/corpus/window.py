"""Windows: which text tokens of a document the model sees together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore.errors import InvalidInput, explain

__all__ = ["Cuts", "Window"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cuts:
    """The windows of several documents, in order; int64 (window) each, in text tokens."""

    document: Integers  # index into the documents that were cut
    start: Integers  # first text token, counted in its document
    n_text: Integers
    n_repeat: Integers  # the first so many were in the window before


@dataclass(frozen=True)
class Window:
    """How documents are cut: `context` tokens a window, BOS included; `stride` text tokens from one to the next.

    Without a stride windows do not overlap. A tokenizer without BOS leaves all of `context` to text.
    """

    context: int
    stride: int | None = None

    def __post_init__(self) -> None:
        if not _is_integer(self.context) or self.context < 2:
            raise InvalidInput(
                explain(
                    f"The context is {self.context!r} tokens",
                    accepted="an integer of at least 2: BOS and one token of text",
                    next_step="give a context such as 1024",
                )
            )
        if self.stride is not None and not (_is_integer(self.stride) and 1 <= self.stride <= self.context):
            raise self._wrong_stride(self.context)

    def text_tokens(self, *, has_bos: bool) -> int:
        """Return how many text tokens a full window holds."""
        return self.context - int(has_bos)

    def text_stride(self, *, has_bos: bool) -> int:
        """Return the text tokens from one window's first to the next one's, the default resolved.

        A window made with the result has the same windows. Raises InvalidInput where windows would leave gaps.
        """
        full = self.text_tokens(has_bos=has_bos)
        if self.stride is not None and self.stride > full:
            raise self._wrong_stride(full)
        return full if self.stride is None else self.stride

    def cut(self, n_tokens: Integers, *, has_bos: bool) -> Cuts:
        """Return the windows of documents with `n_tokens` text tokens, int64 (document).

        A document without tokens has none; the last window ends with its document and may be short.
        """
        full, stride = self.text_tokens(has_bos=has_bos), self.text_stride(has_bos=has_bos)
        n_windows = np.where(n_tokens > 0, 1 + np.maximum(0, -(-(n_tokens - full) // stride)), 0)
        document = np.repeat(np.arange(len(n_tokens), dtype=np.int64), n_windows)
        first_window = np.cumsum(n_windows) - n_windows
        start = (np.arange(len(document), dtype=np.int64) - first_window[document]) * stride
        n_text = np.minimum(full, n_tokens[document] - start)
        return Cuts(document, start, n_text, np.where(start > 0, full - stride, 0))

    def _wrong_stride(self, largest: int) -> InvalidInput:
        return InvalidInput(
            explain(
                f"The stride is {self.stride!r} tokens with a context of {self.context}",
                accepted=f"an integer from 1 to {largest}, so that every token is in a window",
                next_step="leave it out for windows that do not overlap",
            )
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
