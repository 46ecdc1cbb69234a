"""Documents: text with metadata, made clean once, and the digest of a stream of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from actstore.errors import InvalidInput, explain
from actstore.sealed import canonical_json

from .plain_json import SurrogateCount, plain_json

if TYPE_CHECKING:
    from .layout import DocumentRow

__all__ = [
    "Document",
    "DocumentsDigest",
    "MakeDocument",
    "MessageSpan",
    "clean_metadata",
    "document_from",
    "kind_of",
]


@dataclass(frozen=True)
class MessageSpan:
    """Where in a chat's text the content of one message is, in code points; an empty content has an empty span."""

    role: str
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """One item of a dataset: its text, its other fields as JSON values, lone surrogates replaced in both.

    `read_documents` makes them clean; `n_replaced` counts the surrogates that became U+FFFD. A chat's text is what
    the tokenizer's template made of it; `messages` tells, in order of the text, what of it is not the template's.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    n_replaced: int = 0
    messages: tuple[MessageSpan, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InvalidInput(
                explain(f"A document's text is {kind_of(self.text)}", accepted="text", next_step="give it as str")
            )


MakeDocument = Callable[[Any, str], Document]  # an item of a dataset, and what a message calls it


class DocumentsDigest:
    """SHA-256 over every document's canonical JSON `[text,metadata]` and a newline, in order.

    A chat has `[text,metadata,[[role,start,end],…]]`: another template that writes anything else is another corpus.
    Two readings of the same data have the same digest; texts are compared without a tokenizer.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, document: Document | DocumentRow) -> None:
        """Add one document, as it was read or as `lay_out` gives it back."""
        metadata = document.metadata
        spelled = metadata.encode() if isinstance(metadata, str) else canonical_json(dict(metadata))
        spans = [[span.role, span.start, span.end] for span in document.messages]
        chat = b"," + canonical_json(spans) if spans else b""
        self._sha256.update(b"[" + canonical_json(document.text) + b"," + spelled + chat + b"]\n")

    def hexdigest(self) -> str:
        """Return the digest of the documents added so far, as 64 hexadecimal digits."""
        return self._sha256.hexdigest()


def document_from(item: Any, where: str, text_field: str) -> Document:
    """Return the clean document of a text, a mapping with a text field, or a Document.

    `where` is how a message calls the item. Raises InvalidInput where there is no text.
    """
    given = _given(item, where, text_field)
    surrogates = SurrogateCount()
    metadata = clean_metadata(given.metadata, where, surrogates)
    text = surrogates.clean(given.text)
    return replace(given, text=text, metadata=metadata, n_replaced=given.n_replaced + surrogates.n_replaced)


def clean_metadata(metadata: Mapping[str, Any], where: str, surrogates: SurrogateCount) -> dict[str, Any]:
    """Return metadata as JSON values; raises InvalidInput where it is nested too deeply."""
    try:
        cleaned: dict[str, Any] = plain_json(metadata, surrogates)
    except RecursionError:
        raise InvalidInput(
            explain(f"{where} has metadata that is nested too deeply", next_step="flatten or leave out that field")
        ) from None
    return cleaned


def _given(item: Any, where: str, text_field: str) -> Document:
    if isinstance(item, Document):
        return item
    if isinstance(item, str):
        return Document(item)
    if isinstance(item, Mapping):
        return Document(_text_of(item, where, text_field), {key: item[key] for key in item if key != text_field})
    raise InvalidInput(
        explain(
            f"{where} is {kind_of(item)}",
            accepted=f"text, or an object with its text in the field {text_field!r}",
            next_step="give each document in one of these forms; for chats name the field of messages (chat_field)",
        )
    )


def _text_of(item: Mapping[str, Any], where: str, text_field: str) -> str:
    text = item.get(text_field)
    if isinstance(text, str):
        return str(text)
    if text_field in item:
        what = f"{where} has {kind_of(text)} in the field {text_field!r}"
    else:
        what = f"{where} has no field {text_field!r}; its fields are {', '.join(map(str, item)) or 'none'}"
    raise InvalidInput(
        explain(
            what,
            accepted="a field that holds text",
            next_step="name the field that holds the text (text_field), or a chat's messages (chat_field)",
        )
    )


def kind_of(value: object) -> str:
    """Return what a message calls a value that is not what it should be."""
    return "null" if value is None else f"a value of type {type(value).__name__}"
