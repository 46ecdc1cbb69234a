"""Writing one part: a DuckDB file that is finished and durable, or was never there."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import MappingProxyType

import duckdb
import pyarrow as pa

from actstore.errors import StoreBusy, explain
from actstore.sealed import PARTIAL_SUFFIX, publish, sha256_of_file

from .catalog import Cover, Names, Part
from .engine import attach, in_memory, translate_building
from .schema import PART_TABLES, create_table

__all__ = ["ROW_GROUP_ROWS", "PartWriter", "Workshop"]

# Firings are read by ranges of features: with ten times DuckDB's default the bytes per firing and the cost of skipping
# fall (one zone map per row group). All else is looked up by row, which the default finds sooner.
ROW_GROUP_ROWS = 1_228_800
DEFAULT_ROW_GROUP_ROWS = 122_880
BLOCK_BYTES = 1 << 17  # half of DuckDB's default: every column's last block of a row group is partly empty
INSERT_BYTES = 16 << 20
_NO_FACTS: Mapping[str, str | int] = MappingProxyType({})


class PartWriter:
    """Appends Arrow tables to the tables of a part that is being made.

    What comes in small pieces is held until it is worth an INSERT, or until `flush`.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, name: str, go_on: Callable[[], None]) -> None:
        self.connection = connection
        self.name = name
        self._go_on = go_on
        self.rows: dict[str, int] = {}
        self._held: dict[str, list[pa.Table]] = {}

    def append(self, table: str, rows: pa.Table) -> None:
        """Append rows in their order; the columns are those of the table, in its order."""
        self._go_on()
        self.rows[table] = self.rows.get(table, 0) + rows.num_rows
        held = self._held.setdefault(table, [])
        held.append(rows)
        if sum(one.nbytes for one in held) >= INSERT_BYTES:
            self._insert(table)

    def append_query(self, table: str, query: str) -> None:
        """Append what a query over other attached parts returns, in its order."""
        self._insert(table)
        (count,) = self.connection.execute(f"INSERT INTO part.{table} {query}").fetchone() or (0,)
        self.rows[table] = self.rows.get(table, 0) + count

    def flush(self) -> None:
        """Hand over what is held."""
        for table in list(self._held):
            self._insert(table)

    def _insert(self, table: str) -> None:
        if held := self._held.pop(table, []):
            # A view over the rows (`register`) would keep them in memory until the transaction ends.
            self.connection.from_arrow(pa.concat_tables(held)).insert_into(f"part.{table}")


class Workshop:
    """Where parts are made, by several threads: the directory, the names, the memory of each; and what was made."""

    def __init__(self, directory: Path, names: Names, memory_bytes: int) -> None:
        self.directory = directory
        self.names = names
        self.memory_bytes = memory_bytes
        self.made: list[Part] = []
        self._is_stopped = Event()

    def stop(self) -> None:
        """Let every thread end with its next piece: nothing that is being made will be wanted."""
        self._is_stopped.set()

    def go_on(self) -> None:
        """Raise CancelledError where the build was stopped."""
        if self._is_stopped.is_set():
            raise CancelledError

    @contextmanager
    def writing(self, kind: str, stem: str, **types: str) -> Iterator[PartWriter]:
        """Yield the writer of a new part of `kind`; `types` overrides types of columns. `finish` ends it."""
        path = self.names.take(lambda number: f"{stem}.{number}.duckdb")[1]
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        try:
            with translate_building(path.name), self.database(partial) as connection:
                group = ROW_GROUP_ROWS if kind == "firings" else DEFAULT_ROW_GROUP_ROWS
                attach(connection, partial, "part", f"ROW_GROUP_SIZE {group}, BLOCK_SIZE {BLOCK_BYTES}")
                connection.execute("BEGIN")
                for table, columns in PART_TABLES[kind].items():
                    chosen = {column: types.get(column, stored) for column, stored in columns.items()}
                    connection.execute(create_table(f"part.{table}", chosen))
                writer = PartWriter(connection, path.name, self.go_on)
                yield writer
                writer.flush()
                connection.execute("COMMIT")
                connection.execute("CHECKPOINT part")
                connection.execute("DETACH part")
            _fsync_and_publish(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise

    @contextmanager
    def database(self, name: Path) -> Iterator[duckdb.DuckDBPyConnection]:
        """Yield an in-memory database for building that spills beside `name` when it must."""
        # One thread: the memory bound holds, and rows keep the order they are given in.
        connection = in_memory(
            threads=1,
            memory_limit=f"{max(self.memory_bytes // 4, 1 << 27)}B",
            temp_directory=f"{name}.spill{PARTIAL_SUFFIX}",
        )
        try:
            yield connection
        finally:
            connection.close()

    def finish(
        self,
        kind: str,
        subject: str,
        writer: PartWriter,
        covers: Sequence[Cover] = (),
        facts: Mapping[str, str | int] = _NO_FACTS,
    ) -> Part:
        """Return the description of a part that was written, and remember it as made."""
        path = self.directory / writer.name
        n_rows = max(writer.rows.values(), default=0)
        part = Part(
            kind, subject, path.name, path.stat().st_size, sha256_of_file(path), n_rows, tuple(covers), dict(facts)
        )
        self.made.append(part)
        return part

    def discard(self, names: Collection[str] | None = None) -> None:
        """Remove what was made in this build, or those of it that `names` has: no catalog will name it."""
        for part in list(self.made):
            if names is None or part.name in names:
                (self.directory / part.name).unlink(missing_ok=True)
                self.made.remove(part)


def _fsync_and_publish(partial: Path, path: Path) -> None:
    try:
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        publish(partial, path)
    except FileNotFoundError:
        raise StoreBusy(
            explain(f"{path.name} was removed while it was being made", next_step="run `actstore index` again")
        ) from None
