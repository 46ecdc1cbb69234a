"""Which tokens of a chat are its template's, and of whose message the others are: whole batches at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from actstore.blocks import FLAG_TEMPLATE

from .document import Document
from .tokenizer import NO_ROLE, EncodedTexts, TokenizerHandle

__all__ = ["Roles", "mark_messages"]

Integers = npt.NDArray[np.int64]


class Roles:
    """The names of roles by their code, in order of appearance; `known` are those of earlier segments."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._codes = {name: code for code, name in enumerate(known)}

    @property
    def names(self) -> list[str]:
        """The names; the place of each is its code."""
        return list(self._codes)

    def code(self, name: str) -> int:
        """Return the code of a name, a new one where it has none."""
        return self._codes.setdefault(name, len(self._codes))


def mark_messages(
    encoded: EncodedTexts, documents: Sequence[Document], tokenizer: TokenizerHandle, roles: Roles
) -> EncodedTexts:
    """Return the tokens of `documents` with those of chats marked, and without the BOS that a template began with.

    A token that holds a character of a message's content has its role (of the first, should it hold two contents);
    one that holds none is the template's. A chat's windows begin with BOS where its template writes it first, or the
    tokenizer by itself adds it to every text.
    """
    if not any(document.messages for document in documents):
        return encoded
    document = np.repeat(np.arange(len(documents)), encoded.n_tokens)
    is_chat = np.array([bool(one.messages) for one in documents])
    role = _roles_of_tokens(encoded, document, documents, roles)
    is_template = is_chat[document] & (role == NO_ROLE)
    firsts = (np.cumsum(encoded.n_tokens) - encoded.n_tokens)[encoded.n_tokens > 0]
    leading = firsts[
        is_template[firsts] & (encoded.ids[firsts] == (-1 if tokenizer.bos_id is None else tokenizer.bos_id))
    ]
    n_leading = np.bincount(document[leading], minlength=len(documents))
    keep = np.ones(len(document), dtype=bool)
    keep[leading] = False
    return EncodedTexts(
        ids=encoded.ids[keep],
        char_start=encoded.char_start[keep],
        char_end=encoded.char_end[keep],
        n_tokens=encoded.n_tokens - n_leading,
        n_bos=np.where(is_chat, np.maximum(n_leading, int(tokenizer.adds_bos)), encoded.n_bos),
        flags=(encoded.flags | FLAG_TEMPLATE * is_template.astype(np.int32))[keep],
        role=role[keep],
    )


def _roles_of_tokens(
    encoded: EncodedTexts, document: Integers, documents: Sequence[Document], roles: Roles
) -> npt.NDArray[np.int32]:
    """Return the role's code of every token, NO_ROLE where it holds no character of a content: int32 (token)."""
    # One place more than characters, so that a token without any at a text's end is in no other text.
    lengths = np.array([len(one.text) + 1 for one in documents], dtype=np.int64)
    bases = np.cumsum(lengths) - lengths
    spans = _spans(documents, bases.tolist(), roles)
    start = bases[document] + encoded.char_start
    end = np.maximum(bases[document] + encoded.char_end, start + 1)
    place = np.searchsorted(spans[:, 1], start, side="right")
    found = np.concatenate([spans, [[np.iinfo(np.int64).max, 0, NO_ROLE]]])[place]
    return np.where(found[:, 0] < end, found[:, 2], NO_ROLE).astype(np.int32)


def _spans(documents: Sequence[Document], bases: Sequence[int], roles: Roles) -> Integers:
    """Return start, end and role's code of every content that has a character, in order: int64 (span, 3)."""
    spans = [
        (base + span.start, base + span.end, roles.code(span.role))
        for base, document in zip(bases, documents, strict=True)
        for span in document.messages
        if span.end > span.start
    ]
    return np.array(spans, dtype=np.int64).reshape(-1, 3)
