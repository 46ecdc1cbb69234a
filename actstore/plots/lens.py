"""Pictures of a lens: what each layer would say at each token, and how the answer forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from .asked import Asked
from .sheet import (
    DIM,
    MARGIN,
    Picture,
    colour_key,
    heat,
    label_axis,
    must_fit,
    new_picture,
    shown_token,
    text_colour,
    wide,
)

__all__ = ["lens_grid", "lens_trajectory"]

CELLS = 4_000
ROW_INCHES = 0.235
PAGE_INCHES = 24.0  # of cells beside each other; further positions go below
LINES = 8  # positions that are a line each
BEFORE = {"resid_pre": 1.0, "resid_mid": 0.5}  # layers by which a site lies before its layer's resid_post
CHOOSE = "fewer positions: first=… and last=… (--first, --last)"

Cells = Sequence[Mapping[str, Any]]


def lens_grid(table: pa.Table, asked: Asked, *, first: int = 0, last: int | None = None) -> Picture:
    """Draw the likeliest next token of each site (deepest on top) at each position, shaded by its probability.

    A frame marks the cells that say what really came. What is wider than a page goes on below. Raises InvalidInput for
    more than 4,000 cells.
    """
    table = table.filter(pc.equal(table["rank"], 1))
    came = {(one["seq"], one["pos"]): one["input"] for one in table.select(["seq", "pos", "input"]).to_pylist()}
    cells = _between(table, first, last).to_pylist()
    sites = sorted({cell["site"] for cell in cells}, key=lambda site: (_depth(site), site), reverse=True)
    inputs = {cell["row"]: cell for cell in sorted(cells, key=lambda cell: int(cell["row"]))}
    must_fit(len(sites) * len(inputs), CELLS, "cells of text", f"{CHOOSE}, or fewer sites")
    cell_inches = 0.1 + max(wide(shown_token(cell[name]) for cell in cells for name in ("token", "input")), 0.3)
    across = min(len(inputs), int(PAGE_INCHES / cell_inches))
    lines = [list(inputs)[place : place + across] for place in range(0, len(inputs), across)]
    left, bottom = MARGIN + 0.08 + wide(sites), MARGIN + 0.5
    width, height = cell_inches * across, ROW_INCHES * len(sites)
    step = height + 0.62

    lens = asked.parameter("lens") or "logit"
    notes = (f"{lens} lens", f"document {asked.parameter('doc')}", "framed: the token that really came next")
    title = "What each layer would say next"
    top = bottom + step * (len(lines) - 1)
    picture = new_picture(left + width + 0.55, top + height - MARGIN, title, notes, asked)
    for number, rows in enumerate(lines):
        axes = picture.place(left, top - step * number, cell_inches * len(rows), height)
        heat(axes, _draw_cells(axes, cells, sites, rows, came), Normalize(0, 1), grid=True)
        label_axis(axes, "y", range(len(sites)), sites)
        names = [f"{shown_token(inputs[row]['input'])}\n{inputs[row]['pos']}" for row in rows]
        label_axis(axes, "x", range(len(names)), names)
    axes.set_xlabel("input token and its position", color=DIM)
    colour_key(picture, left + width + 0.14, top, height, Normalize(0, 1), "probability")
    return picture


def _depth(site: str) -> float:
    """Return how deep in the residual stream a site is: resid_post.3 and resid_pre.4, which are the same, at 3."""
    kind, _, layer = site.partition(".")
    return int(layer) - BEFORE.get(kind, 0.0)


def _draw_cells(
    axes: Axes, cells: Cells, sites: Sequence[str], rows: Sequence[int], came: Mapping[tuple[int, int], str]
) -> npt.NDArray[np.float64]:
    """Write the tokens, frame those that came, and return the probabilities (site, position)."""
    column = {row: place for place, row in enumerate(rows)}
    line = {site: place for place, site in enumerate(sites)}
    shares = np.full((len(sites), len(rows)), np.nan)
    for cell in (one for one in cells if one["row"] in column):
        y, x = line[cell["site"]], column[cell["row"]]
        shares[y, x] = share = np.nan if cell["logprob"] is None else np.exp(cell["logprob"])
        axes.text(x, y, shown_token(cell["token"]), ha="center", va="center", color=text_colour(share))
        if came.get((cell["seq"], cell["pos"] + 1)) == cell["token"]:
            axes.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, fill=False, lw=1.1, ec=text_colour(share)))
    return shares


def lens_trajectory(table: pa.Table, asked: Asked, *, first: int = 0, last: int | None = None) -> Picture:
    """Draw, over the layers, rank and probability of the token that came, entropy, and distance to the final answer.

    Up to eight positions are a line each, named at its end; of more, the median and the middle half are drawn.
    Raises InvalidInput where nothing is left to draw.
    """
    table = _between(table, first, last)
    depths = np.array([_depth(site) for site in table["site"].to_pylist()])
    layers, rung = np.unique(depths, return_inverse=True)
    between = "; resid_mid.n at n - ½, resid_pre.n at n - 1"
    unit = "layer" if pc.all(pc.starts_with(table["site"], "resid_post")).as_py() else f"layer{between}"
    rows, place = np.unique(table["row"].to_numpy(), return_inverse=True)
    notes = (f"{asked.parameter('lens') or 'logit'} lens", f"document {asked.parameter('doc')}", _drawn(len(rows)))
    title = "How the prediction forms, layer by layer"
    names = _names(table, rows)
    picture = new_picture(8.0 + (0.55 + wide(names) if len(rows) <= LINES else 0), 5.3, title, notes, asked)
    panels = (
        ("target_rank", "rank of the token that came (log scale)"),
        ("target_probability", "its probability"),
        ("entropy", "entropy (nats)"),
        ("kl_to_final", "KL from the final answer (nats)"),
    )
    for number, (name, panel) in enumerate(panels):
        values = np.full((len(rows), len(layers)), np.nan)
        column = table[name].cast(pa.float64()).fill_null(np.nan).to_numpy()
        values[place, rung] = column
        axes = picture.place(0.72 + 4.0 * (number % 2), 3.3 - 2.72 * (number // 2), 3.3, 2.0)
        axes.set_title(panel, loc="left")
        if name == "target_rank":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda rank, _: f"{rank:g}")
        _draw_lines(axes, layers, values, names)
        axes.set_xlabel(unit, color=DIM)
        if number == 1 and len(rows) <= LINES:
            axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1.04), handlelength=2.6)
    return picture


def _drawn(n_positions: int) -> str:
    return "a line per position" if n_positions <= LINES else f"median and middle half of {n_positions} positions"


def _names(table: pa.Table, rows: npt.NDArray[np.int64]) -> list[str]:
    known = {one["row"]: one for one in table.select(["row", "pos", "input"]).to_pylist()}
    return [f"{known[row]['pos']} {shown_token(known[row]['input'], 9)}" for row in rows.tolist()]


def _draw_lines(axes: Axes, layers: npt.NDArray[Any], values: npt.NDArray[np.float64], names: Sequence[str]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    known = values[~np.isnan(values).all(axis=1)]  # the last row of a sequence has no token that came
    if len(names) > LINES and len(known):
        low, middle, high = np.nanquantile(known, (0.25, 0.5, 0.75), axis=0)
        axes.fill_between(layers, low, high, color="#b8cfc6", lw=0)
        axes.plot(layers, middle, color="#1d456d", marker="o", ms=3.5, lw=1.6)
        return
    styles = ("-", "--", "-.", ":")
    for number, (line, name) in enumerate(zip(values, names, strict=True)):
        if np.isnan(line).all():
            continue
        style: dict[str, Any] = {"ls": styles[number % 4], "marker": "os^Dv<>P"[number], "ms": 3.5, "lw": 1.2}
        axes.plot(layers, line, color=("#1d456d", "#00809c", "#4d9f7d", "#8a6d1f")[number % 4], label=name, **style)


def _between(table: pa.Table, first: int, last: int | None) -> pa.Table:
    """Return the rows at positions first … last; there must be one."""
    keep = pc.greater_equal(table["pos"], first)
    kept = table.filter(keep if last is None else pc.and_(keep, pc.less_equal(table["pos"], last)))
    must_fit(0 if kept.num_rows else 1, 0, "positions to show, none of those asked for", CHOOSE)
    return kept
