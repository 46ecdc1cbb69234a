"""Pictures of answers: shaded tables for notebooks, and figures by matplotlib, imported only when one is asked for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actstore.errors import InvalidInput, MissingDependency, QueryError, explain

from .asked import Asked
from .colours import INK, css_colour
from .markup import CELL_CHARACTERS, SHOWN_COLUMNS, SHOWN_ROWS, STRIP_TOKENS, answer_html
from .text import cell_text, one_line

if TYPE_CHECKING:
    from .sheet import Picture

__all__ = [
    "CELL_CHARACTERS",
    "INK",
    "SHOWN_COLUMNS",
    "SHOWN_ROWS",
    "STRIP_TOKENS",
    "Asked",
    "answer_html",
    "cell_text",
    "css_colour",
    "draw",
    "one_line",
]

ENDINGS = (".png", ".pdf", ".svg")


def draw(table: pa.Table, asked: Asked, *, truncated: bool, out: str | Path | None = None, **options: Any) -> Picture:
    """Return the picture of an answer, a matplotlib figure, and write it to `out` where that is given.

    Raises QueryError for a query that has no picture or an answer that is not whole, InvalidInput for options that this
    picture does not have, a file of another kind, or more than can be read, MissingDependency without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        install = "pip install 'actstore[plot]'"
        raise MissingDependency(explain("matplotlib is not installed", next_step=install)) from None
    from .registry import PICTURES
    from .sheet import styled

    if asked.query not in PICTURES:
        what = f"The query {asked.query!r} has no picture" if asked.query else "An answer to SQL has no picture"
        raise QueryError(explain(what, accepted=", ".join(sorted(PICTURES)), next_step="ask one of these queries"))
    if truncated or not table.num_rows:
        what = f"The answer is cut at {table.num_rows} rows" if truncated else "The answer has no rows: nothing to draw"
        raise QueryError(explain(what, next_step="raise the limit (--limit)" if truncated else "ask for more"))
    make = PICTURES[asked.query]
    known = [name for name in inspect.signature(make).parameters if name not in ("table", "asked")]
    if unknown := sorted(set(options) - set(known)):
        what = f"The picture of {asked.query} does not know {', '.join(unknown)}"
        raise InvalidInput(explain(what, accepted=", ".join(known) or "no options"))
    with styled():
        picture = make(table, asked, **options)
        if out is not None:
            _save(picture, Path(out))
    return picture


def _save(picture: Picture, out: Path) -> None:
    if out.suffix.lower() not in ENDINGS:
        raise InvalidInput(explain(f"Pictures are not written as {out.name!r}", accepted=", ".join(ENDINGS)))
    picture.savefig(out)
