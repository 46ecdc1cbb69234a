"""Answers: Arrow first, and from there to whatever a notebook or terminal wants."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .errors import InvalidInput, MissingDependency, explain
from .plots import Asked, answer_html, cell_text, draw

if TYPE_CHECKING:
    import pandas
    import polars

    from .plots.sheet import Picture

__all__ = ["Result", "distinct_names", "text_table"]


@dataclass(frozen=True)
class Result:
    """The rows that a query returned; any library that reads Arrow takes it as it is."""

    table: pa.Table
    truncated: bool = False  # there were more rows than the limit
    asked: Asked = field(default_factory=Asked)  # what it answers

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.table.__arrow_c_stream__(requested_schema)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def arrow(self) -> pa.Table:
        """Return the rows as an Arrow table."""
        return self.table

    def pl(self) -> polars.DataFrame:
        """Return the rows as a Polars data frame; raises MissingDependency without polars."""
        try:
            import polars
        except ImportError as error:
            raise _missing("polars") from error
        frame = polars.from_arrow(self.table)
        assert isinstance(frame, polars.DataFrame)
        return frame

    def df(self) -> pandas.DataFrame:
        """Return the rows as a pandas data frame; raises MissingDependency without pandas."""
        try:
            import pandas  # noqa: F401
        except ImportError as error:
            raise _missing("pandas") from error
        frame: pandas.DataFrame = self.table.to_pandas()
        return frame

    def numpy(self) -> dict[str, npt.NDArray[Any]]:
        """Return one array per column; a column of vectors of equal length becomes one (row, width) array."""
        return {name: _numpy(self.table.column(name)) for name in self.table.column_names}

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows as Python dictionaries."""
        rows: list[dict[str, Any]] = self.table.to_pylist()
        return rows

    def scalar(self) -> Any:
        """Return the one value of a one-row, one-column answer.

        Raises InvalidInput where there is not exactly one.
        """
        if self.table.shape != (1, 1):
            raise InvalidInput(explain(f"The answer is {self.table.shape[0]} rows of {self.table.shape[1]} columns"))
        return self.table.column(0)[0].as_py()

    def plot(self, out: str | Path | None = None, **options: Any) -> Picture:
        """Return the picture of this answer as a matplotlib figure; write it to `out`, a .png, .pdf or .svg.

        Options are the picture's: `first` and `last` position where it shows positions.
        Raises QueryError for an answer that has no picture, InvalidInput for one too large to be read,
        MissingDependency without matplotlib.
        """
        return draw(self.table, self.asked, truncated=self.truncated, out=out, **options)

    def __str__(self) -> str:
        return text_table(self)

    def _repr_html_(self) -> str:
        return answer_html(self.table, truncated=self.truncated)


def distinct_names(table: pa.Table) -> pa.Table:
    """Return a table in which every column can be named: a name that comes again gets a number, as in `a, a_1`."""
    names: list[str] = []
    for name in table.column_names:
        numbered = (name if number == 0 else f"{name}_{number}" for number in range(len(table.column_names) + 1))
        names.append(next(one for one in numbered if one not in names))
    return table if names == table.column_names else table.rename_columns(names)


def text_table(result: Result, *, width: int | None = None) -> str:
    """Return an answer as an aligned table of text, cut to the terminal's width."""
    columns = [[cell_text(value) for value in column.to_pylist()] for column in result.table.columns]
    names = result.table.column_names
    numeric = [_is_number(field.type) for field in result.table.schema]
    total = width or shutil.get_terminal_size((160, 24)).columns
    widths = _widths([[name, *cells] for name, cells in zip(names, columns, strict=True)], total)
    lines = [_line(names, widths, numeric), "  ".join("─" * size for size in widths)]
    lines += [_line(cells, widths, numeric) for cells in zip(*columns, strict=True)]
    return "\n".join([*lines, _count(result)] if result.truncated else lines)


def _count(result: Result) -> str:
    return f"({len(result)} rows shown, there are more)" if result.truncated else f"({len(result)} rows)"


def _widths(columns: Sequence[Sequence[str]], total: int) -> list[int]:
    """Return a width for each column; where they do not fit, the widest gives way."""
    widths = [max(map(len, cells)) for cells in columns]
    while sum(widths) + 2 * (len(widths) - 1) > total and max(widths, default=0) > 12:
        widths[widths.index(max(widths))] -= 1
    return widths


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    cut = [cell if len(cell) <= size else cell[: size - 1] + "…" for cell, size in zip(cells, widths, strict=True)]
    aligned = (c.rjust(w) if number else c.ljust(w) for c, w, number in zip(cut, widths, numeric, strict=True))
    return "  ".join(aligned).rstrip()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _numpy(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunk at all
        return np.asarray(array.to_pylist())
    if pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths = np.asarray(array.value_lengths())
        if len(lengths) and not array.null_count and (lengths == lengths[0]).all():
            return np.asarray(array.flatten()).reshape(len(lengths), lengths[0])
    return np.asarray(array.to_numpy(zero_copy_only=False))


def _missing(library: str) -> MissingDependency:
    return MissingDependency(
        explain(f"{library} is not installed", next_step=f"pip install {library}, or pip install 'actstore[notebook]'")
    )
