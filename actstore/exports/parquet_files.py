"""Parquet files of bounded size that any reader prunes, and the `digests.json` beside them.

FLOAT16 columns are PLAIN, since DuckDB reads no halves that are split by bytes. Every row group has statistics of its
columns, every page a checksum (pyarrow proves it with `page_checksum_verification=True`). The digests are the only
proof that all readers share: DuckDB does not look at page checksums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from actstore.sealed import canonical_json, write_durably

__all__ = ["ROW_GROUP_ROWS", "ParquetFolder", "write_digests"]

ROW_GROUP_ROWS = 500_000
ROW_GROUP_BYTES = 128 << 20  # in memory: documents come with their texts
ROWS_PER_FILE = 100 * ROW_GROUP_ROWS


class ParquetFolder:
    """Writes batches of one schema into `<folder>/part-00000.parquet`, `part-00001.parquet`, …; a context manager.

    `order` names the columns by which rows come sorted; `bounds` of every file are kept of these.
    """

    def __init__(self, folder: Path, schema: pa.Schema, order: Sequence[str] = ()) -> None:
        self.folder, self.schema, self.order = folder, schema, tuple(order)
        self.files: list[dict[str, Any]] = []
        self.n_rows = 0
        self._held: list[pa.Table] = []
        self._n_held = 0
        self._writer: pq.ParquetWriter | None = None
        folder.mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._flush(self._n_held)
            if not self.files:
                self._open()  # an empty table has its columns too
        if self._writer is not None:
            self._writer.close()

    def append(self, table: pa.Table) -> None:
        """Append rows, cast to the schema; they are written a row group at a time."""
        self._held.append(table.cast(self.schema))
        self._n_held += table.num_rows
        while self._n_held >= ROW_GROUP_ROWS:
            self._flush(ROW_GROUP_ROWS)
        if sum(one.nbytes for one in self._held) >= ROW_GROUP_BYTES:
            self._flush(self._n_held)

    def _flush(self, n_rows: int) -> None:
        if not n_rows:
            return
        held = pa.concat_tables(self._held)
        group, rest = held.slice(0, n_rows), held.slice(n_rows)
        self._held, self._n_held = [rest], rest.num_rows
        if self._writer is None or self.files[-1]["rows"] + n_rows > ROWS_PER_FILE:
            self._open()
        assert self._writer is not None
        self._writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
        self._count(group)

    def _open(self) -> None:
        if self._writer is not None:
            self._writer.close()
        path = self.folder / f"part-{len(self.files):05}.parquet"
        self.files.append({"path": path, "rows": 0, "bounds": {}})
        self._writer = pq.ParquetWriter(path, self.schema, **_options(self.schema, self.order))

    def _count(self, group: pa.Table) -> None:
        """Add a row group to what is told of its file: rows, and first and last value of the first sorted column."""
        file = self.files[-1]
        file["rows"] += group.num_rows
        self.n_rows += group.num_rows
        for name in self.order[:1]:
            first = file["bounds"].get(name, [group.column(name)[0].as_py()])[0]
            file["bounds"][name] = [first, group.column(name)[-1].as_py()]


def _options(schema: pa.Schema, order: Sequence[str]) -> Mapping[str, Any]:
    sorting = pq.SortingColumn.from_ordering(schema, [(name, "ascending") for name in order]) if order else None
    dictionaries = [field.name for field in schema if pa.types.is_string(field.type) or field.name in order[:1]]
    return {
        "compression": "zstd",
        "use_dictionary": dictionaries,
        "write_statistics": True,
        "write_page_index": True,
        "write_page_checksum": True,
        "sorting_columns": sorting,
        "store_schema": False,  # Arrow's own types would make pandas and DuckDB disagree
    }


def write_digests(root: Path, folders: Sequence[ParquetFolder], facts: Mapping[str, Any]) -> None:
    """Write `digests.json`: of every file its SHA-256, bytes, rows and, where it is sorted, bounds; and `facts`."""
    files = {}
    for file in (one for folder in folders for one in folder.files):
        with file["path"].open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        name = file["path"].relative_to(root).as_posix()
        size = file["path"].stat().st_size
        files[name] = {"sha256": digest, "bytes": size, "rows": file["rows"], "bounds": file["bounds"]}
    write_durably(root / "digests.json", canonical_json({**facts, "files": files}) + b"\n")
