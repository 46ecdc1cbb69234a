"""Every error that actstore raises on purpose.

    ActstoreError
    ├── InvalidInput (ValueError)        a value given by the user is wrong
    │   ├── RecipeMismatch               the store was made by another recipe
    │   ├── QueryError                   SQL or a named query is wrong
    │   └── UnsupportedFormat            a file or store of a kind or version this release does not read
    ├── MissingInput (FileNotFoundError) a model, SAE, dataset or store that is not there
    ├── UnknownName (LookupError)        a site, layer, SAE, query or function that does not exist
    ├── StoreBusy (BlockingIOError)      somebody else holds the store, a shard or the catalog
    ├── CorruptStore (OSError)           stored bytes are not what was written
    ├── NoSpace (OSError)                the disk is or would become too full
    ├── Unhealthy (RuntimeError)         a proof says that the stored numbers would be wrong
    └── MissingDependency (ImportError)  an optional library is not installed

Each class is also the builtin that a stranger would catch, and carries the status a web service answers with.
A message says what happened, the value, what is accepted and the next step: `explain` puts these together.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ActstoreError",
    "CorruptStore",
    "InvalidInput",
    "MissingDependency",
    "MissingInput",
    "NoSpace",
    "QueryError",
    "RecipeMismatch",
    "StoreBusy",
    "Unhealthy",
    "UnknownName",
    "UnsupportedFormat",
    "explain",
    "unknown_name",
]


class ActstoreError(Exception):
    """Base of every error raised on purpose; catching it catches them all."""

    http_status = 500

    def __str__(self) -> str:
        # OSError subclasses would otherwise print an errno tuple.
        return str(self.args[0]) if self.args else type(self).__name__


class InvalidInput(ActstoreError, ValueError):
    """A value given by the user is wrong."""

    http_status = 400


class RecipeMismatch(InvalidInput):
    """The store was made by another recipe; the message lists the fields that differ."""

    http_status = 409


class QueryError(InvalidInput):
    """SQL or a named query is wrong."""


class UnsupportedFormat(InvalidInput):
    """A file or store of a kind or version that this release does not read."""


class MissingInput(ActstoreError, FileNotFoundError):
    """A model, SAE, dataset or store that is not there."""

    http_status = 404


class UnknownName(ActstoreError, LookupError):
    """A site, layer, SAE, query or function that does not exist."""

    http_status = 404


class StoreBusy(ActstoreError, BlockingIOError):
    """Somebody else holds the store, a shard or the catalog."""

    http_status = 409


class CorruptStore(ActstoreError, OSError):
    """Stored bytes are not what was written."""


class NoSpace(ActstoreError, OSError):
    """The disk is, or would become, too full."""

    http_status = 507


class Unhealthy(ActstoreError, RuntimeError):
    """A proof says that the stored numbers would be wrong."""

    http_status = 422


class MissingDependency(ActstoreError, ImportError):
    """An optional library is not installed; the message has the install line."""

    http_status = 501


def explain(what: str, *, accepted: str | None = None, next_step: str | None = None) -> str:
    """Return one message: what happened with its value, what is accepted, the next step."""
    parts = [what if what.endswith("?") else what.rstrip(".") + "."]
    if accepted:
        parts.append(f"Accepted: {accepted.rstrip('.')}.")
    if next_step:
        parts.append(f"Next: {next_step.rstrip('.')}.")
    return " ".join(parts)


def unknown_name(kind: str, value: str, known: Iterable[str], *, next_step: str | None = None) -> UnknownName:
    """Return an `UnknownName` that offers the nearest of `known`, then all of them (at most 40)."""
    names = list(known)
    near = difflib.get_close_matches(value, names, n=3)
    shown = ", ".join(names[:40]) + (f", … ({len(names)} in all)" if len(names) > 40 else "")
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return UnknownName(explain(f"There is no {kind} {value!r}.{hint}", accepted=shown or "none", next_step=next_step))
