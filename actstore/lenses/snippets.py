"""Snippets: a token marked in the text around it, right for every tokenizer because it cuts the text, not tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from actstore.blocks import TOKEN_FIELDS
from actstore.errors import InvalidInput, explain
from actstore.store import StoreReader

__all__ = ["MARKS", "snippets"]

MARKS = ("«", "»")
_SEQ, _START, _END, _ID = (TOKEN_FIELDS.index(name) for name in ("seq", "char_start", "char_end", "token_id"))


def snippets(
    reader: StoreReader, rows: npt.NDArray[np.int64], before: npt.NDArray[np.int64], after: npt.NDArray[np.int64]
) -> list[str]:
    """Return the text of each row's token between « and », with so many tokens before and after it in its sequence.

    The text is the document's own between the tokens' code-point offsets. A token that is a part of a code point
    (byte fallback) marks all of that code point; one without text, such as BOS, shows its name.
    Raises UnknownName for rows that do not exist, InvalidInput for negative numbers of tokens.
    """
    if len(rows) and (before.min() < 0 or after.min() < 0):
        raise InvalidInput(explain("snippet() was asked for a negative number of tokens", accepted="0 or more"))
    seqs = reader.token_column("seq", rows)
    docs = reader.documents_of(seqs)
    return [_snippet(reader, *place) for place in zip(rows.tolist(), docs.tolist(), before, after, strict=True)]


def _snippet(reader: StoreReader, row: int, doc: int, before: int, after: int) -> str:
    shard, place = divmod(row, reader.shard_rows)
    window, here = _window(reader.tokens(shard), place, int(before), int(after))
    text = reader.document_text(doc)
    start, end = int(here[_START]), int(here[_END])
    token = text[start:end] or (str(reader.vocabulary()[int(here[_ID])]) if start == end else "")
    return f"{text[int(window[0]) : start]}{MARKS[0]}{token}{MARKS[1]}{text[end : int(window[1])]}"


def _window(
    tokens: npt.NDArray[np.int32], place: int, before: int, after: int
) -> tuple[Sequence[int], npt.NDArray[np.int32]]:
    """Return the code points from which to which the window goes, cut at the sequence's ends, and the token itself."""
    here = tokens[place]
    near = tokens[max(0, place - before) : place + after + 1]
    inside = near[near[:, _SEQ] == here[_SEQ]]
    return (int(inside[:, _START].min()), int(inside[:, _END].max())), here
