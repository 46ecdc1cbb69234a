"""Pictures made of text: the logit lens, layer × position, as a terminal shows it."""

from __future__ import annotations

import math

from .errors import QueryError, explain
from .plots import one_line
from .results import Result
from .sites import parse_site

__all__ = ["lens_grid"]

CELL = 11  # characters of a token
SHADES = " ░▒▓█"  # probability in fifths: readable without colour


def lens_grid(result: Result, *, first: int = 0, last: int | None = None) -> str:
    """Return the answer of the query `logit_lens` as a grid: a line per site, deepest on top, a column per position.

    Each cell has the likeliest next token and a shade for its probability, in fifths. Raises QueryError for no rows.
    """
    rows = [
        row
        for row in result.rows()
        if row["rank"] == 1 and first <= row["pos"] and (last is None or row["pos"] <= last)
    ]
    if not rows:
        raise QueryError(
            explain(
                "There is nothing to show: no residual site and no lens is stored of this document (its shard may not "
                "be extracted yet), or no position is asked for",
                next_step="actstore extract MODEL --into STORE --lens 5, or --site 'resid_post.*'",
            )
        )
    layers = {row["site"]: row["layer"] for row in rows}
    positions = sorted({(row["row"], row["pos"], row["input"]) for row in rows})
    cells = {(row["site"], row["row"]): _cell(row["token"], row["logprob"]) for row in rows}
    margin = max([len(site) for site in layers] + [5])
    lines = [f"{'input':>{margin}}  " + " ".join(_token(text).ljust(CELL) for _, _, text in positions)]
    for site in sorted(layers, key=lambda one: parse_site(one).depth, reverse=True):
        lines.append(f"{site:>{margin}}  " + " ".join(cells.get((site, row), " " * CELL) for row, _, _ in positions))
    legend = "probability of the top token: " + " ".join(
        f"{shade!r} from {20 * step} %" for step, shade in enumerate(SHADES)
    )
    return "\n".join([*lines, legend])


def _cell(token: str, logprob: float) -> str:
    shade = SHADES[min(len(SHADES) - 1, int(math.exp(logprob) * len(SHADES)))]
    return f"{_token(token)[: CELL - 2]:<{CELL - 2}} {shade}"


def _token(text: str) -> str:
    return one_line(text)[:CELL]
