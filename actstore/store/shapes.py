"""The shapes of sealed documents: a seal proves that nothing changed, and not that what was written made sense.

What a document must look like is said by types alone: those of a dataclass's fields, with the accepted spelling of a
text or the range of a number as annotation. So a store from elsewhere is refused where it is read, not where it hurts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache, partial
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from actstore.errors import CorruptStore, explain

__all__ = [
    "Artifact",
    "Count",
    "Digest",
    "FeatureNumber",
    "MetadataPath",
    "Owner",
    "PassId",
    "PieceName",
    "StoredPath",
    "read_as",
    "read_fields",
    "refusing",
]

_PART = "[A-Za-z0-9_][A-Za-z0-9._-]*"  # of a path: leads nowhere else, and is not hidden

Count = Annotated[int, range(1 << 53)]
Digest = Annotated[str, "[0-9a-f]{64}"]
PassId = Annotated[str, "[0-9a-f]{16}"]
Owner = Annotated[str, "corpus|[0-9a-f]{16}"]
PieceName = Annotated[str, f"{_PART}(/{_PART})*"]
Artifact = Annotated[
    str, f"corpus/tokens|predictions|(sites|firings)/{_PART}|lens/{_PART}/{_PART}|attention/[0-9]{{1,6}}"
]
MetadataPath = Annotated[str, f"arrays(/{_PART})*/zarr[.]json"]
StoredPath = Annotated[str, f"(arrays|firings)(/{_PART}){{2,}}"]
FeatureNumber = Annotated[str, "0|[1-9][0-9]{0,8}"]


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn what a document of another shape than is read raises into a CorruptStore that names the document."""
    try:
        yield
    except (TypeError, ValueError, LookupError) as error:
        raise CorruptStore(
            explain(
                f"{name} is sealed and is not what this release writes ({str(error)[:500]})",
                next_step="install a newer actstore if one made this store; if none did, do not use the store",
            )
        ) from None


def read_as(kind: Any, value: Any, what: str) -> Any:
    """Return a JSON value as a type: a dataclass, a tuple of one type, a mapping from texts, one or none, or plain.

    `what` is how messages call the value. Raises TypeError for a value of another type, ValueError for one that its
    annotation does not accept.
    """
    try:
        return _reader(kind)(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


def read_fields(kinds: Mapping[str, Any], value: Any, what: str) -> None:
    """Raise as `read_as` where a JSON object has not these fields; what else it has is nobody's."""
    given = _plain(dict, value)
    for name, kind in kinds.items():
        read_as(kind, given.get(name), f"{what}: {name}")


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """Return what reads a value as a type; made once, since receipts prove as many files as a store has."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: value
    if is_dataclass(kind):
        return _fields_reader(kind)
    if origin is Annotated:
        return _annotated_reader(_reader(arguments[0]), arguments[1])
    if origin is tuple:
        item = _reader(arguments[0])
        return lambda value: tuple([item(one) for one in _plain(list, value)])
    if origin is Mapping:
        key, item = _reader(arguments[0]), _reader(arguments[1])
        return lambda value: {key(name): item(one) for name, one in _plain(dict, value).items()}
    if origin in (UnionType, Union):
        item = _reader(next(one for one in arguments if one is not NoneType))
        return lambda value: None if value is None else item(value)
    return partial(_plain, kind)


def _plain(kind: type, value: Any) -> Any:
    """Return a value of exactly this type: true is no number; a whole number is one that may have a fraction."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise TypeError(f"{_short(value)} where {kind.__name__} is read")
    if type(value) is int and not -1 << 63 <= value < 1 << 63:
        raise ValueError(f"{_short(value)} where 64 bits are read")
    return value


def _fields_reader(kind: Any) -> Callable[[Any], Any]:
    readers = {name: _reader(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}

    def read(value: Any) -> Any:
        given = _plain(dict, value)
        if unknown := given.keys() - readers.keys():
            raise TypeError(f"{_short(min(unknown))}, which is not known")
        return kind(**{name: _named(name, readers[name], one) for name, one in given.items()})

    return read


def _named(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _annotated_reader(read: Callable[[Any], Any], accepted: str | range) -> Callable[[Any], Any]:
    fits = accepted.__contains__ if isinstance(accepted, range) else re.compile(accepted).fullmatch

    def read_fitting(value: Any) -> Any:
        if not fits(read(value)):
            raise ValueError(f"{_short(value)} where {accepted} is read")
        return value

    return read_fitting


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
