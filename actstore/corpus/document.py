"""Documents: text with metadata, made clean once, and the digest of a stream of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actstore.errors import InvalidInput, explain
from actstore.sealed import canonical_json

from .plain_json import SurrogateCount, plain_json

if TYPE_CHECKING:
    from .layout import DocumentRow

__all__ = ["Document", "DocumentsDigest", "document_from"]


@dataclass(frozen=True)
class Document:
    """One item of a dataset: its text, its other fields as JSON values, lone surrogates replaced in both.

    `read_documents` makes them clean; `n_replaced` counts the surrogates that became U+FFFD.
    """

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    n_replaced: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InvalidInput(
                explain(f"A document's text is {_kind(self.text)}", accepted="text", next_step="give it as str")
            )


class DocumentsDigest:
    """SHA-256 over every document's canonical JSON `[text,metadata]` and a newline, in order.

    Two readings of the same data have the same digest; no tokenizer is needed to compare them.
    """

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, document: Document | DocumentRow) -> None:
        """Add one document, as it was read or as `lay_out` gives it back."""
        metadata = document.metadata
        spelled = metadata.encode() if isinstance(metadata, str) else canonical_json(dict(metadata))
        self._sha256.update(b"[" + canonical_json(document.text) + b"," + spelled + b"]\n")

    def hexdigest(self) -> str:
        """Return the digest of the documents added so far, as 64 hexadecimal digits."""
        return self._sha256.hexdigest()


def document_from(item: Any, where: str, text_field: str) -> Document:
    """Return the clean document of a text, a mapping with a text field, or a Document.

    `where` is how a message calls the item. Raises InvalidInput where there is no text.
    """
    text, metadata, n_replaced = _parts(item, where, text_field)
    surrogates = SurrogateCount()
    try:
        metadata = plain_json(metadata, surrogates)
    except RecursionError:
        raise InvalidInput(
            explain(f"{where} has metadata that is nested too deeply", next_step="flatten or leave out that field")
        ) from None
    text = surrogates.clean(text)
    return Document(text, metadata, n_replaced + surrogates.n_replaced)


def _parts(item: Any, where: str, text_field: str) -> tuple[str, Mapping[str, Any], int]:
    if isinstance(item, Document):
        return item.text, item.metadata, item.n_replaced
    if isinstance(item, str):
        return item, {}, 0
    if isinstance(item, Mapping):
        return _text_of(item, where, text_field), {key: item[key] for key in item if key != text_field}, 0
    raise InvalidInput(
        explain(
            f"{where} is {_kind(item)}",
            accepted=f"text, or an object with its text in the field {text_field!r}",
            next_step="give each document in one of these forms",
        )
    )


def _text_of(item: Mapping[str, Any], where: str, text_field: str) -> str:
    text = item.get(text_field)
    if isinstance(text, str):
        return str(text)
    if text_field in item:
        what = f"{where} has {_kind(text)} in the field {text_field!r}"
    else:
        what = f"{where} has no field {text_field!r}; its fields are {', '.join(map(str, item)) or 'none'}"
    raise InvalidInput(
        explain(what, accepted="a field that holds text", next_step="name the field that holds the text (text_field)")
    )


def _kind(value: object) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"
