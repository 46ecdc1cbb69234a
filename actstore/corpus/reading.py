"""Documents from whatever the user has: one door, decided by what the source is."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from actstore.errors import InvalidInput, MissingInput, explain

from .chat import Chats
from .document import Document, MakeDocument, document_from
from .files import SUFFIXES, read_folder, read_one_file, read_stream
from .hub import is_loaded_dataset, is_saved_dataset, open_hub_dataset, open_saved_dataset, read_dataset

__all__ = ["read_documents"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ACCEPTED = f"a file ({', '.join(SUFFIXES)}), a folder of these, a hub dataset owner/name, - for standard input"


def read_documents(
    source: Any,
    *,
    text_field: str = "text",
    chats: Chats | None = None,
    config: str | None = None,
    split: str | None = None,
    streaming: bool = True,
    revision: str | None = None,
) -> Iterator[Document]:
    """Return the documents of a source, one after the other, in a fixed order.

    `source` is one of
    - a `.jsonl` file: one object a line, blank lines skipped; fields other than `text_field` become metadata;
    - a `.txt` file: one document; a `.parquet` file: one document a row, other columns become metadata;
    - a folder of these, sorted, with the relative file name as metadata `file`;
    - `-`: standard input, JSON lines where its first character that is not blank is `{`, else one plain text;
    - a folder written by `save_to_disk`, a `datasets` object, or a hub id `owner/name`
      (`config`, `split`, `streaming`, `revision` apply; without `split`: the only one, or `train`);
    - an iterable of texts, mappings or Documents.
    With `chats` each item is a chat: an object with the field that they name, or in an iterable the messages
    themselves; its text is what the template makes of it (`text_field` is not asked then).

    Lone surrogates become U+FFFD and are counted; metadata that is not JSON becomes text or null.
    Raises MissingInput where nothing is there, MissingDependency for an optional library, InvalidInput (with file
    and line, from 1) for what cannot be read and for a source without documents.
    """
    make = partial(document_from, text_field=text_field) if chats is None else chats.document
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        documents = _read_named(name, make, config, split, streaming, revision)
    elif is_loaded_dataset(source):
        name = "The dataset"
        _refuse(name, config=config, revision=revision, **({} if isinstance(source, dict) else {"split": split}))
        documents = read_dataset(source, name, split, make)
    else:
        name = "The source"
        _refuse(name, config=config, split=split, revision=revision)
        documents = _read_iterable(source, make)
    return _at_least_one(documents, "Standard input" if name == "-" else name)


def _read_named(
    name: str, make: MakeDocument, config: str | None, split: str | None, streaming: bool, revision: str | None
) -> Iterator[Document]:
    path = Path(name).expanduser()
    if name != "-" and not path.exists():
        if not _is_hub_name(name):
            raise _missing(name)
        dataset = open_hub_dataset(name, config=config, split=split, streaming=streaming, revision=revision)
        return read_dataset(dataset, name, split, make)
    _refuse(name, config=config, revision=revision)
    if path.is_dir() and is_saved_dataset(path):
        dataset = open_saved_dataset(path)
        _refuse(name, **({} if isinstance(dataset, dict) else {"split": split}))
        return read_dataset(dataset, name, split, make)
    _refuse(name, split=split)
    if name == "-":
        return read_stream(sys.stdin.buffer, "standard input", make)
    return read_folder(path, make) if path.is_dir() else read_one_file(path, make)


def _is_hub_name(name: str) -> bool:
    return _HUB_NAME.fullmatch(name) is not None and not name.lower().endswith(SUFFIXES)


def _missing(name: str) -> MissingInput:
    return MissingInput(
        explain(f"There is no dataset {name!r}", accepted=_ACCEPTED, next_step="check the path or the name")
    )


def _refuse(name: str, **options: str | None) -> None:
    """Refuse options that would change nothing, so that none is believed to have had an effect."""
    if given := [f"{option}={value!r}" for option, value in options.items() if value is not None]:
        raise InvalidInput(
            explain(
                f"{name} has nothing to choose by {', '.join(given)}",
                accepted="config and revision for hub datasets, split for datasets that have splits",
                next_step="leave it out",
            )
        )


def _read_iterable(source: Any, make: MakeDocument) -> Iterator[Document]:
    if isinstance(source, (Mapping, bytes, Document)) or not isinstance(source, Iterable):
        raise InvalidInput(
            explain(
                f"A value of type {type(source).__name__} is not a dataset",
                accepted=f"{_ACCEPTED}, a datasets object, a list of texts, dicts or chats",
                next_step="put a single document into a list",
            )
        )
    return (make(item, f"Document {number}") for number, item in enumerate(source, start=1))


def _at_least_one(documents: Iterator[Document], name: str) -> Iterator[Document]:
    first = next(documents, None)
    if first is None:
        raise InvalidInput(
            explain(f"{name} holds no document", accepted="at least one document", next_step="check what it holds")
        )
    return chain([first], documents)
