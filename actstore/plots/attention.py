"""Pictures of attention: the pattern of one head, a grid of heads, and maps of all heads, layer × head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
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

__all__ = ["attention_between", "attention_pattern", "head_scores"]

PATTERN_CELLS, PANELS, HEADS = 4_000_000, 144, 20_000
NAMED_TOKENS = 64  # of a pattern, each with its text beside it
TOKEN_INCHES = 0.17
PAGE_INCHES = 14.0
FRACTIONS = ("previous_token", "self_attention", "bos_attention", "induction")

Panel = tuple[int, int]  # sequence, head


def attention_pattern(table: pa.Table, asked: Asked, *, first: int = 0, last: int | None = None) -> Picture:
    """Draw who looks at whom: a line for each token that looks, a column for each that is looked at.

    Of several heads, or several sequences, a grid. Weights are on a square-root scale, so that light ones are seen.
    Raises InvalidInput for more than 4,000,000 cells or 144 panels.
    """
    table = _between(table, first, last)
    panels = sorted({(one["seq"], one["head"]) for one in table.select(["seq", "head"]).to_pylist()})
    span = int(pc.max(table["pos"]).as_py()) + 1 - first
    must_fit(len(panels), PANELS, "panels", "one head (-p head=…) or one sequence (-p seq=…)")
    must_fit(span * span * len(panels), PATTERN_CELLS, "cells", "one head, or fewer positions: first=… and last=…")
    alone = len(panels) == 1
    of_one_text = len({seq for seq, _ in panels}) == 1
    names = _tokens(table, first, span) if of_one_text and span <= (NAMED_TOKENS if alone else 40) else []
    side = max(span * TOKEN_INCHES, 1.3) if names else (7.0 if alone else 2.2)
    gap = 0.3 if names else 0.45
    across = min(max(1, int(PAGE_INCHES / (side + gap))), int(np.ceil(np.sqrt(len(panels)))))
    down = -(-len(panels) // across)
    label = 0.06 + wide(names) if names else 0.3
    left, bottom = MARGIN + label + 0.24, MARGIN + label + 0.24
    width, height = across * (side + gap) - gap, down * (side + gap) - gap
    title = f"Where the tokens look: {_which(asked, panels)}"
    notes = (f"document {asked.parameter('doc')}", _kept(table))
    picture = new_picture(left + width + 0.55, bottom + height + (0 if alone else 0.12), title, notes, asked)
    scale = PowerNorm(0.5, 0, 1)
    for number, (seq, head) in enumerate(panels):
        x, y = number % across, number // across
        below = number + across >= len(panels)
        axes = picture.place(left + x * (side + gap), bottom + (down - 1 - y) * (side + gap), side, side)
        heat(axes, _weights(table, seq, head, first, span), scale)
        if not alone:
            axes.set_title(f"head {head}" if of_one_text else f"head {head}, sequence {seq}", pad=3)
        _name_ends(axes, names, first, span, with_x=below or not names, with_y=x == 0 or not names)
        axes.set_ylabel("token that looks" if x == 0 else "", color=DIM)
        axes.set_xlabel("token looked at" if below else "", color=DIM)
    key = min(height, 3.0)
    colour_key(picture, left + width + 0.14, bottom + height - key, key, scale, "attention weight (square-root scale)")
    return picture


def _which(asked: Asked, panels: Sequence[Panel]) -> str:
    heads = sorted({head for _, head in panels})
    named = f"head {heads[0]}" if len(heads) == 1 else f"{len(heads)} heads"
    return f"layer {asked.parameter('layer')}, {named}"


def _kept(table: pa.Table) -> str:
    """Return what share of the attention the picture has, where some of it was not kept."""
    rows = table.group_by(["head", "row"]).aggregate([("kept_weight", "max")])
    share = float(pc.mean(rows["kept_weight_max"]).as_py())
    return "" if share > 0.9995 else f"the keys that were kept hold {share:.1%} of the attention"


def _weights(table: pa.Table, seq: int, head: int, first: int, span: int) -> npt.NDArray[np.float64]:
    """Return a head's weights (token that looks, token looked at); NaN after the token that looks."""
    mine = table.filter(pc.and_(pc.equal(table["seq"], seq), pc.equal(table["head"], head)))
    n_tokens = int(pc.max(mine["pos"]).as_py()) + 1 - first
    weights = np.where(np.tri(n_tokens, dtype=bool), 0.0, np.nan)
    weights[mine["pos"].to_numpy() - first, mine["key_pos"].to_numpy() - first] = mine["weight"].to_numpy()
    return weights


def _tokens(table: pa.Table, first: int, span: int) -> list[str]:
    known = {one["pos"]: one["token"] for one in table.select(["pos", "token"]).to_pylist()}
    return [shown_token(known.get(first + place)) for place in range(span)]


def _name_ends(axes: Axes, names: Sequence[str], first: int, span: int, *, with_x: bool, with_y: bool) -> None:
    """Name the tokens on both axes; where there are too many, their positions."""
    if not names:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
            axis.set_major_formatter(lambda place, _: f"{place + first:.0f}" if place >= 0 else "")
        return
    label_axis(axes, "x", range(span), names if with_x else [""] * span, rotation=90)
    label_axis(axes, "y", range(span), names if with_y else [""] * span)


def head_scores(table: pa.Table, asked: Asked) -> Picture:
    """Draw each score of every head as a map, layer (deepest on top) × head; fractions share one scale."""
    scores = ("entropy", *FRACTIONS)
    maps = {name: _head_map(table, name) for name in scores}
    most = max(float(np.nanmax(maps[name], initial=0)) for name in FRACTIONS)
    scales = {name: Normalize(0, most or 1) for name in FRACTIONS}
    scales["entropy"] = Normalize(0, float(np.nanmax(maps["entropy"], initial=0)) or 1)
    units = dict.fromkeys(FRACTIONS, "fraction of the attention") | {"entropy": "nats"}
    notes = ("means over plain tokens",)
    return _maps(table, maps, scales, units, "What each attention head does", notes, asked)


def attention_between(table: pa.Table, asked: Asked) -> Picture:
    """Draw how much each head looks from the one group of tokens to the other, layer (deepest on top) × head."""
    values = _head_map(table, "mean_weight")
    scale = Normalize(0, float(np.nanmax(values, initial=0)) or 1)
    ends = [asked.parameter(f"{side}_tokens") or asked.parameter(f"{side}_rows") for side in ("from", "to")]
    looking, looked_at = (f"“{shown_token(end, 24)}”" if end else "any token" for end in ends)
    title = f"Which heads look from {looking} to {looked_at}"
    notes = (f"mean over {table['n_rows'][0].as_py():,} tokens that look",)
    units = {"mean_weight": "fraction of the attention"}
    return _maps(table, {"mean_weight": values}, {"mean_weight": scale}, units, title, notes, asked)


def _head_map(table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    """Return a column as a matrix (layer, head), deepest layer first; NaN where there is no number."""
    layers, place = np.unique(table["layer"].to_numpy(), return_inverse=True)
    heads = table["head"].to_numpy()
    must_fit(len(layers) * (int(heads.max()) + 1), HEADS, "heads", "one layer: -p layer=…")
    values = np.full((len(layers), int(heads.max()) + 1), np.nan)
    values[len(layers) - 1 - place, heads] = table[name].cast(pa.float64()).fill_null(np.nan).to_numpy()
    return values


def _maps(
    table: pa.Table,
    maps: Mapping[str, npt.NDArray[np.float64]],
    scales: Mapping[str, Normalize],
    units: Mapping[str, str],
    title: str,
    notes: Sequence[str],
    asked: Asked,
) -> Picture:
    """Draw maps (layer, head) beside each other, each with its key; numbers stand in the cells where there is room."""
    layers = np.unique(table["layer"].to_numpy())[::-1].tolist()
    n_lines, n_columns = next(iter(maps.values())).shape
    roomy = n_lines * n_columns <= 600
    cell_width, cell_height = (0.36, 0.24) if roomy else (0.16, 0.13)
    width, height = max(n_columns * cell_width, 0.9), max(n_lines * cell_height, 0.7)
    step, across = width + 1.35, min(len(maps), max(1, int(PAGE_INCHES / (width + 1.35))))
    down = -(-len(maps) // across)
    line = height + (0.85 if len(maps) > 1 else 0.6)
    picture = new_picture(across * step - 0.35, down * line - 0.12, title, notes, asked)
    for number, (name, values) in enumerate(maps.items()):
        left, bottom = MARGIN + 0.42 + number % across * step, MARGIN + 0.42 + (down - 1 - number // across) * line
        axes = picture.place(left, bottom, width, height)
        heat(axes, values, scales[name], grid=roomy)
        if len(maps) > 1:
            axes.set_title(name.replace("_", " "), loc="left", pad=4)
        if roomy:
            _write_numbers(axes, values, scales[name])
        every = max(1, -(-n_lines // 40))
        label_axis(axes, "y", range(0, n_lines, every), [str(layer) for layer in layers[::every]])
        axes.xaxis.set_major_locator(MaxNLocator(min(n_columns, 12), integer=True))
        axes.set_xlabel("head", color=DIM)
        axes.set_ylabel("layer" if number % across == 0 else "", color=DIM)
        colour_key(picture, left + width + 0.1, bottom, height, scales[name], units[name])
    return picture


def _write_numbers(axes: Axes, values: npt.NDArray[np.float64], scale: Normalize) -> None:
    for (y, x), value in np.ndenumerate(values):
        if value == value:
            text = f"{value:.2f}".removeprefix("0") if value < 9.995 else f"{value:.0f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=text_colour(float(scale(value))))


def _between(table: pa.Table, first: int, last: int | None) -> pa.Table:
    keep = pc.and_(pc.greater_equal(table["pos"], first), pc.greater_equal(table["key_pos"], first))
    if last is not None:
        keep = pc.and_(keep, pc.less_equal(table["pos"], last))
    kept = table.filter(keep)
    must_fit(0 if kept.num_rows else 1, 0, "positions, none of those asked for", "other positions")
    return kept
