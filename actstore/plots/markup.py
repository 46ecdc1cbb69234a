"""Answers in a notebook: a table, and tokens shaded by how strongly a feature fires; nothing comes from the network.

Everything is escaped, and the size is capped whatever the answer holds.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .colours import css_colour, dark_text_on
from .text import MARKED, cell_text, one_line

__all__ = ["CELL_CHARACTERS", "SHOWN_COLUMNS", "SHOWN_ROWS", "STRIP_TOKENS", "answer_html"]

SHOWN_ROWS, SHOWN_COLUMNS, CELL_CHARACTERS = 40, 30, 200  # of a table
STRIP_TOKENS, TOKEN_CHARACTERS = 600, 60

_NUMBER = ' style="text-align:right"'
_TEXT = ' style="text-align:left;white-space:pre-wrap"'
_STRIP = "font-family:monospace;white-space:pre-wrap;line-height:1.9;margin:0.5em 0"


def answer_html(table: pa.Table, *, truncated: bool) -> str:
    """Return an answer as HTML.

    Tokens with an activation that stand in the order of their rows (columns token, activation, row) are a strip of text
    in which each is shaded; elsewhere an activation shades its token, or the marked one of its snippet.
    """
    shown = table.slice(0, SHOWN_ROWS)
    strongest = _strongest(table)
    strip = _strip(table, strongest) if _is_running_text(table) else ""
    names = shown.column_names[:SHOWN_COLUMNS]
    head = "".join(f"<th>{_escaped(name, CELL_CHARACTERS)}</th>" for name in names)
    body = "".join(_row(row, names, strongest) for row in shown.to_pylist())
    more = f"<p>{_more(table, truncated)}</p>" if _more(table, truncated) else ""
    return f"{strip}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _row(row: Mapping[str, Any], names: Sequence[str], strongest: float) -> str:
    activation = row.get("activation")
    share = activation / strongest if strongest and isinstance(activation, float) else None
    return f"<tr>{''.join(_cell(name, row[name], share) for name in names)}</tr>"


def _cell(name: str, value: Any, share: float | None) -> str:
    kind = _NUMBER if isinstance(value, (int, float)) and not isinstance(value, bool) else _TEXT
    inside = _escaped(cell_text(value), CELL_CHARACTERS)
    if isinstance(value, str):
        opening = "<mark>" if share is None else f'<mark style="{_shade(share)}">'
        inside = MARKED.sub(lambda found: f"{opening}{found[1]}</mark>", inside)
        if name == "token" and share is not None:
            inside = f'<span style="{_shade(share)}">{inside}</span>'
    return f"<td{kind}>{inside}</td>"


def _more(table: pa.Table, truncated: bool) -> str:
    said = []
    if truncated or table.num_rows > SHOWN_ROWS:
        said.append(f"{table.num_rows} rows{', there are more' if truncated else ''}; the first {SHOWN_ROWS} are shown")
    if table.num_columns > SHOWN_COLUMNS:
        said.append(f"{table.num_columns} columns; the first {SHOWN_COLUMNS} are shown")
    return ". ".join(said)


def _strongest(table: pa.Table) -> float:
    """Return the highest activation of an answer; 0 where it has none."""
    if "activation" not in table.column_names or not pa.types.is_floating(table.schema.field("activation").type):
        return 0.0
    values = np.asarray(table.column("activation").to_numpy(), dtype=np.float64)
    return float(np.max(values, initial=0, where=np.isfinite(values)))


def _is_running_text(table: pa.Table) -> bool:
    """Return whether the rows are tokens as they follow each other; a new sequence may begin anywhere."""
    if not {"token", "activation", "row"} <= set(table.column_names) or table.num_rows < 2:
        return False
    rows = table.column("row").to_numpy()
    steps = np.diff(rows)
    new = np.diff(table.column("seq").to_numpy()) != 0 if "seq" in table.column_names else np.zeros(len(steps), bool)
    return bool((steps > 0).all() and ((steps == 1) | new).all())


def _strip(table: pa.Table, strongest: float) -> str:
    shown = table.select(["token", "activation"]).slice(0, STRIP_TOKENS)
    texts, activations = (column.to_pylist() for column in shown.columns)
    tokens = "".join(_token(text, one, strongest) for text, one in zip(texts, activations, strict=True))
    rest = f" … ({table.num_rows - STRIP_TOKENS} more tokens)" if table.num_rows > STRIP_TOKENS else ""
    key = f"darkest: activation {strongest:.4g}" if strongest else "no token fires"
    return f'<div style="{_STRIP}">{tokens}{rest}</div><p>{key}</p>'


def _token(text: str | None, activation: float | None, strongest: float) -> str:
    shown = _escaped(text or "", TOKEN_CHARACTERS)
    ending = "<br>" if text and text.endswith("\n") else ""
    if not activation or not strongest:
        return f"<span>{shown}</span>{ending}"
    title = html.escape(f"{activation:.4g}")
    return f'<span title="{title}" style="{_shade(activation / strongest)}">{shown}</span>{ending}'


def _shade(share: float) -> str:
    return f"background:{css_colour(share)};color:{'#111111' if dark_text_on(share) else '#ffffff'}"


def _escaped(text: str, n_characters: int) -> str:
    """Return a text, cut, as HTML that says it and does nothing."""
    shown = one_line(text)
    return html.escape(shown if len(shown) <= n_characters else shown[:n_characters] + "…")
