"""Reading: one connection over the parts of a catalog, and the one path by which SQL reaches it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import duckdb
import pyarrow as pa

from actstore.errors import CorruptStore, QueryError, explain

from .attaching import attach_parts, refuse_callables
from .catalog import Catalog, Part
from .engine import REMAKE, in_memory, reading_error
from .few import Limit, few_rows, keeps_few, limit_of
from .functions import Raised, SqlFunction, register
from .late import call_late
from .narrowing import Parameters, Place, find_places, narrow
from .schema import PART_TABLES, TABLES, create_table, quote_name
from .statements import MAX_TEXT_BYTES, check_statement
from .views import LABELS, NARROWED, Attached, of_sae, view_query

__all__ = ["Answer", "Connection", "Labels", "open_index", "plain_connection"]

Labels = Iterable[tuple[str, int, str]]  # sae, feature, label
Locate = Callable[[str], Path]

# Files first: DuckDB could otherwise be told to overwrite or detach the parts that it has open. What locks comes last.
_LOCKS = ("enable_external_access=false", "disabled_filesystems='LocalFileSystem'", "lock_configuration=true")
_BATCH_ROWS = 65_536
_STATEMENTS_CACHED = 256


@dataclass(frozen=True)
class Answer:
    """The rows that a statement returned; `truncated` says that there were more than the limit."""

    table: pa.Table
    truncated: bool


def open_index(
    catalog: Catalog,
    locate: Locate,
    *,
    functions: Sequence[SqlFunction] = (),
    labels: Labels = (),
    memory_limit: str = "50%",
    threads: int | None = None,
) -> Connection:
    """Return a read-only connection with every table of the contract and `functions`.

    `locate` returns where the file of a part is. A query that needs more than `memory_limit` fails: nothing spills,
    because a connection that may write files could be told to write over the parts.
    Raises CorruptStore where a part is missing or cannot be opened.
    """
    raised = Raised()
    config = {"memory_limit": memory_limit} | ({"threads": threads} if threads else {})
    given = list(labels)
    root = in_memory(**config)
    attached = _prepare(root, catalog, locate, functions, given, raised)
    for setting in _LOCKS:
        root.execute(f"SET {setting}")
    return Connection(root, raised, (function.name for function in functions), Narrowed(attached, given))


def plain_connection(
    catalog: Catalog, locate: Locate, *, functions: Sequence[SqlFunction] = (), labels: Labels = ()
) -> duckdb.DuckDBPyConnection:
    """Return an ordinary DuckDB connection with the same tables and functions, for tools that want one.

    It is its owner's: files, settings and new tables are allowed, the parts stay read-only as far as DuckDB keeps them.
    """
    connection = duckdb.connect(":memory:")
    _prepare(connection, catalog, locate, functions, list(labels), Raised())
    return connection


class Narrowed:
    """The queries of tables over the parts of one SAE alone, made when they are first asked for."""

    def __init__(self, attached: Attached, labels: Labels) -> None:
        saes = {part.subject for _, part in attached if part.kind in ("firings", "features", "reconstruction")}
        self._parts = {sae: of_sae(attached, sae) for sae in saes}
        self._labelled = {sae for sae, _, _ in labels}
        named = {(alias, table) for alias, part in attached for table in PART_TABLES[part.kind]}
        self.tables = frozenset({*named, tuple(LABELS.split("."))})
        self.query = lru_cache(None)(self._query)

    def _query(self, table: str, sae: str) -> str | None:
        if sae not in self._parts:
            return None
        return view_query(table, self._parts[sae], labelled=sae in self._labelled)


@dataclass
class Checked:
    """A statement that was found to be only reading: the text to execute, where it may be narrowed, what it keeps.

    `is_alike` is no more where its answer turned out to have columns that DuckDB has to encode.
    """

    text: str
    places: tuple[Place, ...]
    limit: Limit
    is_alike: bool = True


class Connection:
    """A read-only connection that any thread may use; each call has a cursor of its own."""

    def __init__(
        self, root: duckdb.DuckDBPyConnection, raised: Raised, functions: Iterable[str], narrowed: Narrowed
    ) -> None:
        self._root = root
        self._raised = raised
        self._functions = frozenset(functions)
        self._narrowed = narrowed
        self.has_ended = False  # DuckDB met an error of its own making: it answers nothing more
        # What a text is found to be depends on nothing else; a text that is refused is looked at again.
        self._checked = lru_cache(_STATEMENTS_CACHED)(self._check)
        self._parsed = lru_cache(_STATEMENTS_CACHED)(self._parse)

    def sql(self, text: str, parameters: Parameters = None, *, limit: int | None = None) -> Answer:
        """Return what one statement says, at most `limit` rows of it; whole decimals that fit are int64.

        `parameters` are bound: a sequence for `?`, a mapping for `$name`.
        Raises QueryError, saying what is accepted, for anything but one reading statement or where it is wrong;
        what a function raised as its own error; CorruptStore where a part is damaged.
        """
        few = self._few(text, parameters)
        if few is not None:
            return Answer(few.slice(0, limit), limit is not None and len(few) > limit)
        with self.stream(text, parameters) as reader:
            held: list[pa.RecordBatch] = []
            n_rows = 0
            for batch in reader:
                held.append(batch)
                n_rows += batch.num_rows
                if limit is not None and n_rows > limit:
                    break
            table = _with_integers(pa.Table.from_batches(held, reader.schema))
        truncated = limit is not None and n_rows > limit
        return Answer(table.slice(0, limit) if truncated else table, truncated)

    def _few(self, text: str, parameters: Parameters) -> pa.Table | None:
        """Return the answer of a statement that keeps few rows, None of one that is to be streamed."""
        checked = self._checked(text)
        if not (checked.is_alike and keeps_few(checked.limit, parameters)):
            return None
        with self._root.cursor() as cursor, self._translated():
            statement = self._parsed(*self._narrow(checked, parameters))
            few = few_rows(cursor.execute(statement, _bound(parameters)))
        checked.is_alike = few is not None
        return few

    def stream(
        self, text: str, parameters: Parameters = None, *, batch_rows: int = _BATCH_ROWS
    ) -> pa.RecordBatchReader:
        """Return what one statement says as a stream of batches; otherwise as `sql`. Close it or read it to its end."""
        checked = self._checked(text)
        cursor = self._root.cursor()
        with self._translated():
            statement = self._parsed(*self._narrow(checked, parameters))
            reader = cursor.sql(statement, params=_bound(parameters)).to_arrow_reader(batch_rows)
        return pa.RecordBatchReader.from_batches(reader.schema, self._batches(cursor, reader))

    def close(self) -> None:
        """Close the files."""
        self._root.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, text: str) -> Checked:
        """Return what to execute: with functions called late, where the check accepts that text as well."""
        with self._root.cursor() as cursor:
            statement = check_statement(cursor, text)
            limit = limit_of(statement.select)
            if statement.select is not None:
                late = call_late(statement.text, statement.select, statement.nodes, self._functions)
                with suppress(QueryError):
                    statement = check_statement(cursor, late) if late else statement
        places = () if statement.select is None else find_places(statement.text, statement.nodes, NARROWED)
        return Checked(statement.text, places, limit)

    def _narrow(self, checked: Checked, parameters: Parameters) -> tuple[str, bool]:
        """Return the text to execute, and whether it is another than was checked."""
        text = narrow(checked.text, checked.places, parameters, self._narrowed.query)
        changed = text != checked.text and len(text.encode()) <= MAX_TEXT_BYTES
        return text if changed else checked.text, changed

    def _parse(self, text: str, changed: bool) -> duckdb.Statement:
        """Return the statement of a text; one that was changed is checked again: what runs is what was checked."""
        with self._root.cursor() as cursor:
            if changed:
                check_statement(cursor, text, self._narrowed.tables)
            (statement,) = cursor.extract_statements(text)
        return statement

    def _batches(self, cursor: duckdb.DuckDBPyConnection, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        try:
            with self._translated():
                yield from reader
        finally:
            reader.close()
            cursor.close()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (duckdb.Error, OSError, pa.ArrowException) as error:  # Arrow's, while a stream is being read
            self.has_ended |= isinstance(error, (duckdb.InternalException, duckdb.FatalException))
            raise self._raised.find(str(error)) or reading_error(error) from None


def _with_integers(table: pa.Table) -> pa.Table:
    """Return the table with int64 where a column of decimals without places fits: DuckDB's sums of integers."""
    for place, field in enumerate(table.schema):
        if pa.types.is_decimal128(field.type) and field.type.scale == 0:
            with suppress(pa.ArrowInvalid):  # a value that does not fit keeps the column as it is
                table = table.set_column(place, field.name, table.column(place).cast(pa.int64()))
    return table


def _bound(parameters: Parameters) -> Any:
    return dict(parameters) if isinstance(parameters, Mapping) else list(parameters or ())


def _prepare(
    connection: duckdb.DuckDBPyConnection,
    catalog: Catalog,
    locate: Locate,
    functions: Sequence[SqlFunction],
    labels: Collection[tuple[str, int, str]],
    raised: Raised,
) -> Attached:
    """Attach the parts and make tables and functions; return the parts with their aliases."""
    attached = attach_parts(connection, catalog.parts, lambda part: _present(locate, part))
    # Listing functions takes DuckDB as long as all the rest does, and nothing of the rest could call one.
    with connection.cursor() as cursor, ThreadPoolExecutor(1) as beside:
        refused = beside.submit(refuse_callables, cursor, attached)
        for function in functions:
            register(connection, function, raised)
        _add_labels(connection, labels)
        for table in TABLES:
            query = view_query(table, attached, labelled=bool(labels))
            connection.execute(f"CREATE VIEW {quote_name(table)} AS {query}")
        refused.result()
    return attached


def _present(locate: Locate, part: Part) -> Path:
    """Return where the part is, if it has its size there; a shorter file might be opened and fail only when read."""
    try:
        path = locate(part.name)
        found = path.stat().st_size if path.is_file() else None
    except FileNotFoundError:  # of a remote store, or removed at this moment
        found = None
    if found != part.n_bytes:
        said = "is missing" if found is None else f"has {found} bytes instead of {part.n_bytes}"
        raise CorruptStore(explain(f"The part {part.name} {said}", next_step=REMAKE))
    return path


def _add_labels(connection: duckdb.DuckDBPyConnection, labels: Collection[tuple[str, int, str]]) -> None:
    columns = {"sae": "VARCHAR", "feature": "INTEGER", "label": "VARCHAR"}
    connection.execute("CREATE SCHEMA internal")
    connection.execute(create_table(LABELS, columns))
    saes, features, texts = zip(*labels, strict=True) if labels else ((), (), ())
    # Bound as lists: registering a table would import pandas, which costs more than all the rest of opening.
    values = "unnest(?::VARCHAR[]), unnest(?::INTEGER[]), unnest(?::VARCHAR[])"
    connection.execute(f"INSERT INTO {LABELS} SELECT {values}", [list(saes), list(features), list(texts)])
