"""Documents in files: JSON lines, plain text, Parquet, folders of these, standard input."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

from actstore.errors import InvalidInput, UnsupportedFormat, explain

from .document import Document, MakeDocument
from .optional import require

__all__ = ["SUFFIXES", "read_folder", "read_one_file", "read_stream"]

_UTF8_BOM = b"\xef\xbb\xbf"
_PARQUET_ROWS = 256  # rows decoded at once; a row may hold a whole book
_JSON_LINES_EXAMPLE = 'one JSON object a line, such as {"text": "…", "source": "…"}'


def read_folder(folder: Path, make: MakeDocument) -> Iterator[Document]:
    """Yield the documents of every readable file below `folder`, in order of their relative names.

    The relative name becomes the metadata field `file`, unless the data has a field of that name. Names that begin
    with a dot are left out. Raises InvalidInput where there is no file to read.
    """
    files = sorted(_files_below(folder), key=lambda path: path.relative_to(folder).as_posix())
    if not files:
        raise InvalidInput(
            explain(
                f"The folder {folder} holds no file that can be read",
                accepted=f"files ending in {', '.join(SUFFIXES)}, or a dataset written by save_to_disk",
                next_step="check the folder, or give one file",
            )
        )
    return chain.from_iterable(_with_file_name(path, folder, make) for path in files)


def read_one_file(path: Path, make: MakeDocument) -> Iterator[Document]:
    """Return the documents of one file, by its suffix; raises UnsupportedFormat for other suffixes."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UnsupportedFormat(
            explain(
                f"The file {path} ends in {path.suffix!r}",
                accepted=f"{', '.join(SUFFIXES)}, or a folder of these",
                next_step="convert it to .jsonl, one JSON object a line",
            )
        )
    return reader(path, make)


def read_stream(stream: IO[bytes], name: str, make: MakeDocument) -> Iterator[Document]:
    """Yield the documents of a byte stream that has no suffix.

    JSON lines where the first character that is not blank is `{`; else all of it is one plain text document.
    A stream without a byte holds no document.
    """
    head: list[bytes] = []
    for line in stream:
        head.append(line)
        if line.removeprefix(_UTF8_BOM).strip():
            break
    if not head:
        return
    lines = chain(head, stream)
    if head[-1].removeprefix(_UTF8_BOM).lstrip().startswith(b"{"):
        yield from _json_lines(lines, name, make)
    else:
        yield make(_decode(b"".join(lines), name, 1), name)


def _files_below(folder: Path) -> Iterator[Path]:
    for directory, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(directory, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.suffix.lower() in SUFFIXES)


def _with_file_name(path: Path, folder: Path, make: MakeDocument) -> Iterator[Document]:
    # A file name may hold bytes that are not UTF-8; Python shows these as surrogates.
    name = os.fsencode(path.relative_to(folder).as_posix()).decode(errors="replace")
    for document in read_one_file(path, make):
        yield replace(document, metadata={"file": name, **document.metadata})


def _read_jsonl(path: Path, make: MakeDocument) -> Iterator[Document]:
    with path.open("rb") as lines:
        yield from _json_lines(lines, str(path), make)


def _json_lines(lines: Iterable[bytes], name: str, make: MakeDocument) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        text = _decode(line, name, number)
        if text.strip():
            where = f"{name}, line {number},"
            yield make(_json_object(text, where), where)


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        problem = None if isinstance(value, dict) else "holds JSON that is not an object"
    except json.JSONDecodeError as error:
        problem = f"is not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError):
        problem = "holds a number too long or objects nested too deeply"
    if problem:
        raise InvalidInput(
            explain(f"{where} {problem}", accepted=_JSON_LINES_EXAMPLE, next_step="correct or remove that line")
        )
    assert isinstance(value, dict)
    return value


def _read_txt(path: Path, make: MakeDocument) -> Iterator[Document]:
    yield make(_decode(path.read_bytes(), str(path), 1), str(path))


def _decode(data: bytes, name: str, first_line: int) -> str:
    """Return UTF-8 `data` as text, without a byte order mark where `data` begins the file."""
    if first_line == 1:
        data = data.removeprefix(_UTF8_BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise InvalidInput(
            explain(
                f"{name}, line {line}, holds the byte 0x{data[error.start]:02X}, which is not UTF-8 there",
                accepted="UTF-8 text",
                next_step="convert the file to UTF-8, for example with iconv",
            )
        ) from error


def _read_parquet(path: Path, make: MakeDocument) -> Iterator[Document]:
    parquet = require("pyarrow.parquet", "Reading a .parquet file")
    first_row = 1
    with path.open("rb") as file:
        for batch in _parquet_batches(parquet, file, path):
            columns = {name: _plain_values(batch.column(i)) for i, name in enumerate(batch.schema.names)}
            for offset in range(batch.num_rows):
                item = {name: values[offset] for name, values in columns.items()}
                yield make(item, f"{path}, row {first_row + offset},")
            first_row += batch.num_rows


def _parquet_batches(parquet: Any, file: IO[bytes], path: Path) -> Iterator[Any]:
    arrow_error = require("pyarrow", "Reading a .parquet file").ArrowException
    try:
        yield from parquet.ParquetFile(file).iter_batches(batch_size=_PARQUET_ROWS)
    except (arrow_error, OSError) as error:
        raise InvalidInput(
            explain(
                f"{path} cannot be read as Parquet ({error})",
                accepted="a whole Parquet file",
                next_step="write or download the file again",
            )
        ) from error


def _plain_values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, TypeError):
        # Dates beyond Python's years, nanoseconds, unknown time zones, text that is not UTF-8: value by value.
        return [_plain_value(scalar) for scalar in column]


def _plain_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError, TypeError):
        pass
    try:
        return scalar.cast("string").as_py()
    except (ValueError, OverflowError, TypeError, NotImplementedError):
        return None


_READERS: dict[str, Callable[[Path, MakeDocument], Iterator[Document]]] = {
    ".jsonl": _read_jsonl,
    ".txt": _read_txt,
    ".parquet": _read_parquet,
}
SUFFIXES = tuple(_READERS)
