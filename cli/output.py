"""What commands print: tables in several formats, progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from actstore.errors import InvalidInput, explain
from actstore.progress import Report
from actstore.results import Result, text_table

__all__ = [
    "FORMATS",
    "bytes_text",
    "draw_result",
    "json_option",
    "plot_option",
    "print_json",
    "print_result",
    "progress",
    "store_argument",
]

FORMATS = ("table", "json", "csv", "parquet", "arrow")
LINE_SECONDS = 5.0  # between plain lines of progress

store_argument = click.argument("store")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
plot_option = click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw a picture instead: a .png, .pdf or .svg."
)


def print_json(value: Any) -> None:
    """Print a value as JSON; bytes and dates as text."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=1, default=str))


def print_result(result: Result, form: str = "table", output: Path | None = None) -> None:
    """Print an answer, or write it to a file.

    Raises InvalidInput where a binary format would go to a terminal.
    """
    if form in ("parquet", "arrow") and output is None and sys.stdout.isatty():
        raise InvalidInput(explain(f"{form} is not for a terminal", next_step="add --output FILE, or pipe it"))
    data = _WRITERS[form](result)
    if output is None:
        click.echo(data, nl=isinstance(data, str))
    else:
        output.write_bytes(data.encode() + b"\n" if isinstance(data, str) else data)
    if result.truncated and form != "table":
        click.echo(f"({len(result)} rows; there are more: raise --limit)", err=True)


def draw_result(result: Result, out: Path, **options: Any) -> None:
    """Draw an answer's picture into a file, and say where; options that are None are left out."""
    picture = result.plot(out, **{name: value for name, value in options.items() if value is not None})
    width, height = picture.get_size_inches()
    click.echo(f"{out}: {width * picture.dpi:.0f} × {height * picture.dpi:.0f} pixels")


def _json(result: Result) -> str:
    return json.dumps([_plain(row) for row in result.rows()], ensure_ascii=False, indent=1, default=str)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


def _csv(result: Result) -> str:
    """Lists and structures are JSON text inside their cell."""
    flat = {
        name: [json.dumps(_plain(v)) if isinstance(v, (list, dict)) else v for v in column.to_pylist()]
        if pa.types.is_nested(column.type)
        else column
        for name, column in zip(result.table.column_names, result.table.columns, strict=True)
    }
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(pa.table(flat), buffer)
    return buffer.getvalue().decode().rstrip("\n")


def _parquet(result: Result) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(result.table, buffer)
    return buffer.getvalue()


def _arrow(result: Result) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, result.table.schema) as writer:
        writer.write_table(result.table)
    return buffer.getvalue()


_WRITERS: dict[str, Callable[[Result], str | bytes]] = {
    "table": text_table,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}


@contextmanager
def progress() -> Iterator[Report]:
    """Give a report that draws bars on a terminal and prints a line now and then elsewhere, to standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def report(doing: str, done: int, total: int | None, unit: str) -> None:
            if total is None and not done and not unit:  # not a quantity: something to know
                console.print(doing, highlight=False, markup=False)
                return
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing, total=total, unit=unit)
            bars.update(tasks[doing], completed=done, total=total, unit=unit)

        yield report


class _Lines:
    """Progress as lines: the first of each thing, its end, and one every few seconds between."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._ended: set[str] = set()

    def __call__(self, doing: str, done: int, total: int | None, unit: str) -> None:
        now = time.monotonic()
        # A thing that has parts, such as an index, ends several times: once is enough.
        ends = total is not None and done >= total and doing not in self._ended
        if ends or now - self._last.get(doing, 0.0) > LINE_SECONDS:
            self._last[doing] = now
            self._ended |= {doing} if ends else set()
            of = "" if total is None else f" of {total}"
            click.echo(f"{doing}: {done}{of} {unit}".rstrip() if done or total else doing, err=True)


def bytes_text(n_bytes: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"
