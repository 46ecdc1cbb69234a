"""Functions that SQL can call: how they are given, and how their errors come back whole."""

from __future__ import annotations

import inspect
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
import pyarrow as pa
from duckdb.func import ARROW, DEFAULT, SPECIAL

from actstore.errors import ActstoreError

__all__ = ["Raised", "SqlFunction", "register"]


@dataclass(frozen=True)
class SqlFunction:
    """A scalar function over Arrow arrays: `function(*columns) -> pa.Array` of the same length.

    `parameters` and `returns` are DuckDB types, such as "BIGINT" or "STRUCT(token_id INTEGER, logprob FLOAT)[]".
    With `nulls="default"` a NULL argument gives NULL without a call; with "special" the function sees it.
    Called for at most 2,048 rows at a time, from any thread.
    """

    name: str
    function: Callable[..., pa.Array]
    parameters: tuple[str, ...]
    returns: str
    nulls: Literal["default", "special"] = "default"


class Raised:
    """Keeps the ActstoreErrors that functions raised inside DuckDB until the query's error is translated.

    DuckDB carries an exception's text only; a mark in the text finds the exception again.
    """

    MARK = re.compile(r"actstore-error-(\d+)")
    LIMIT = 256  # errors that no query picks up (several threads raised, one was reported) are forgotten

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._errors: OrderedDict[int, ActstoreError] = OrderedDict()

    def keep(self, error: ActstoreError) -> str:
        """Remember an error and return a text with the mark that finds it."""
        number = next(self._numbers)
        self._errors[number] = error
        if len(self._errors) > self.LIMIT:
            self._errors.popitem(last=False)
        return f"{error} [actstore-error-{number}]"

    def find(self, message: str) -> ActstoreError | None:
        """Return the error whose mark is in `message`, once."""
        mark = self.MARK.search(message)
        return self._errors.pop(int(mark[1]), None) if mark else None


def register(connection: duckdb.DuckDBPyConnection, function: SqlFunction, raised: Raised) -> None:
    """Make a function callable from SQL on this connection and its cursors."""

    def call(*columns: Any) -> pa.Array:
        try:
            return function.function(*columns)
        except ActstoreError as error:
            raise RuntimeError(raised.keep(error)) from None

    # DuckDB compares the number of parameters with the function's signature.
    names = [
        inspect.Parameter(f"column_{n}", inspect.Parameter.POSITIONAL_ONLY) for n in range(len(function.parameters))
    ]
    call.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    connection.create_function(
        function.name,
        call,
        [connection.sqltype(kind) for kind in function.parameters],  # `duckdb.sqltype` opens a database for itself
        connection.sqltype(function.returns),
        type=ARROW,
        null_handling=SPECIAL if function.nulls == "special" else DEFAULT,
    )
