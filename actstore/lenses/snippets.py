"""Snippets: a token marked in the text around it, right for every tokenizer because it cuts the text, not tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from actstore.blocks import TOKEN_FIELDS
from actstore.errors import InvalidInput, explain
from actstore.store import StoreReader

__all__ = ["MARKS", "places_of_rows", "snippets"]

MARKS = ("«", "»")
ROWS_AT_ONCE = 1 << 18  # of all windows together
_SEQ, _POS, _START, _END, _ID = map(TOKEN_FIELDS.index, ("seq", "pos", "char_start", "char_end", "token_id"))

Numbers = npt.NDArray[np.int64]


def snippets(reader: StoreReader, rows: Numbers, before: Numbers, after: Numbers) -> list[str]:
    """Return the text of each row's token between « and », with so many tokens before and after it in its sequence.

    The text is the document's own between the tokens' code-point offsets. A token that is a part of a code point
    (byte fallback) marks all of that code point; one without text, such as BOS, shows its name.
    Raises UnknownName for rows that do not exist, InvalidInput for negative numbers of tokens.
    """
    if len(rows) and (before.min() < 0 or after.min() < 0):
        raise InvalidInput(explain("snippet() was asked for a negative number of tokens", accepted="0 or more"))
    here = reader.token_rows(rows)
    docs, first, n_tokens = reader.sequences_of(here[:, _SEQ]).T
    starts, ends = _windows(reader, np.maximum(first, rows - before), np.minimum(first + n_tokens - 1, rows + after))
    places = zip(docs.tolist(), starts.tolist(), ends.tolist(), here.tolist(), strict=True)
    return [_snippet(reader, *place) for place in places]


def places_of_rows(reader: StoreReader, rows: Numbers) -> tuple[Numbers, npt.NDArray[np.int32], list[str]]:
    """Return document int64 (row), position in the sequence int32 (row) and display text of each row's token.

    Raises UnknownName for rows that do not exist.
    """
    tokens = reader.token_rows(rows)
    vocabulary = reader.vocabulary()
    texts = [vocabulary[number].as_py() for number in tokens[:, _ID].tolist()]
    return reader.documents_of(tokens[:, _SEQ]), np.ascontiguousarray(tokens[:, _POS]), texts


def _windows(reader: StoreReader, first: Numbers, last: Numbers) -> tuple[Numbers, Numbers]:
    """Return the code points from which to which the rows first … last of each window go."""
    lengths = last - first + 1
    step = max(1, ROWS_AT_ONCE // int(lengths.max(initial=1)))
    parts = [_bounds(reader, first[at : at + step], lengths[at : at + step]) for at in range(0, len(first), step)]
    starts, ends = zip(*parts, strict=True) if parts else ((), ())
    return np.concatenate([np.empty(0, np.int64), *starts]), np.concatenate([np.empty(0, np.int64), *ends])


def _bounds(reader: StoreReader, first: Numbers, lengths: Numbers) -> tuple[Numbers, Numbers]:
    begins = np.cumsum(lengths) - lengths
    tokens = reader.token_rows(np.arange(lengths.sum()) + np.repeat(first - begins, lengths))
    return np.minimum.reduceat(tokens[:, _START], begins), np.maximum.reduceat(tokens[:, _END], begins)


def _snippet(reader: StoreReader, doc: int, first: int, last: int, here: list[int]) -> str:
    text = reader.document_text(doc)
    start, end = here[_START], here[_END]
    token = text[start:end] or (str(reader.vocabulary()[here[_ID]]) if start == end else "")
    return f"{text[first:start]}{MARKS[0]}{token}{MARKS[1]}{text[end:last]}"
