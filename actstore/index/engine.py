"""DuckDB's edge: how connections are opened, and what its errors become."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt

from actstore.errors import ActstoreError, CorruptStore, NoSpace, QueryError, explain

from .schema import quote_name, quote_text

__all__ = [
    "REMAKE",
    "allow_open_files",
    "attach",
    "fetch_columns",
    "in_memory",
    "one_line",
    "reading_error",
    "translate_building",
    "translate_reading",
]

# Nothing is fetched, nothing is looked up in the caller's variables, nothing spills unless a caller says where.
_CLOSED: Mapping[str, str | bool] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "allow_persistent_secrets": False,
    "python_enable_replacements": False,
    "temp_directory": "",
}

_DAMAGE = re.compile(r"computed checksum|Corrupt database file|not a valid DuckDB database|Could not read")
_TOO_MANY_FILES = os.strerror(errno.EMFILE)
_SPARE_FILES = 256  # for whatever else the process opens while the parts stay open
_limits = Lock()
REMAKE = "run `actstore verify --repair` on the store: it makes the damaged part again"


def in_memory(**config: str | int | bool) -> duckdb.DuckDBPyConnection:
    """Return a fresh in-memory database that reaches for nothing by itself."""
    return duckdb.connect(":memory:", config={**_CLOSED, **config})


def allow_open_files(n_more: int) -> None:
    """Let this process open so many more files, as far as its hard limit goes: every part stays open.

    The usual limit is 1,024 or less. It is changed only where it would be approached, and never lowered.
    """
    with _limits, suppress(OSError, ValueError):  # who may not change it is told when a file cannot be opened
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = len(list(Path("/dev/fd").iterdir())) + n_more + _SPARE_FILES
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def attach(connection: duckdb.DuckDBPyConnection, path: Path, alias: str, options: str = "READ_ONLY") -> None:
    """Attach a DuckDB file; raises CorruptStore where it cannot be opened, NoSpace where too many files are open."""
    with translate_reading(path.name):
        # Without a type DuckDB looks at the file, and would fetch and load an extension for other databases.
        connection.execute(f"ATTACH {quote_text(str(path))} AS {quote_name(alias)} (TYPE duckdb, {options})")


def fetch_columns(connection: duckdb.DuckDBPyConnection, query: str) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of a query whose values are numbers and not NULL, by name."""
    return {name: np.asarray(column) for name, column in connection.execute(query).fetchnumpy().items()}


def one_line(error: BaseException) -> str:
    """Return DuckDB's message without its kind, the excerpt of the statement and line breaks; hints are kept."""
    message = str(error).split("\n\nLINE ")[0]
    message = re.sub(r"^(Invalid Input|[A-Z][A-Za-z-]*(?: [A-Z][a-z]+)?) Error: ", "", message.strip())
    return " ".join(message.split())


@contextmanager
def translate_reading(part: str) -> Iterator[None]:
    """Turn DuckDB's errors about a part's bytes into CorruptStore, and about open files into NoSpace."""
    try:
        yield
    except duckdb.Error as error:
        if _TOO_MANY_FILES in str(error):
            raise _too_many_files(part) from None
        raise CorruptStore(explain(f"The part {part} cannot be read: {one_line(error)}", next_step=REMAKE)) from None


def _too_many_files(part: str) -> NoSpace:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return NoSpace(
        explain(
            f"This process may have {soft} files open, too few for the parts of the index: {part} is one too many",
            next_step="allow more, `ulimit -n 65536`, or run `actstore index`, which joins the parts of an SAE",
        )
    )


@contextmanager
def translate_building(part: str) -> Iterator[None]:
    """Turn DuckDB's errors while a part is made into NoSpace, CorruptStore or QueryError."""
    try:
        yield
    except duckdb.Error as error:
        raise _building_error(part, error) from None


def _building_error(part: str, error: duckdb.Error) -> ActstoreError:
    said = one_line(error)
    if "No space left" in said or "disk is full" in said.lower():
        return NoSpace(
            explain(f"The disk is full: {part} could not be written", next_step="free space and index again")
        )
    if isinstance(error, duckdb.OutOfMemoryException):
        return NoSpace(explain(f"{part} needs more memory: {said}", next_step="give the index more memory"))
    if _DAMAGE.search(said):
        return CorruptStore(explain(f"What {part} is made from cannot be read: {said}", next_step=REMAKE))
    return QueryError(explain(f"{part} could not be made: {said}"))


def reading_error(error: Exception) -> ActstoreError:
    """Return what an error of a query means: a damaged part, too little memory, or a wrong statement."""
    said = one_line(error)
    if _DAMAGE.search(said):
        return CorruptStore(explain(f"A part of the index is damaged: {said}", next_step=REMAKE))
    if "Out of Memory Error" in str(error):
        return QueryError(
            explain(f"The query needs more memory than it may use: {said}", next_step="filter or limit it")
        )
    return QueryError(said)
