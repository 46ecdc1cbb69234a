"""Pictures of text: tokens shaded by a feature, and its strongest firings set one below the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from .asked import Asked
from .colours import css_colour
from .sheet import (
    DIM,
    MARGIN,
    TEXT_POINTS,
    Picture,
    colour_key,
    glyphs,
    inches,
    must_fit,
    new_picture,
    text_colour,
    wide,
)
from .text import MARKED, one_line

__all__ = ["concordance", "token_strip"]

STRIP_TOKENS, EXAMPLES = 2_000, 100
LINE_INCHES, TOKEN_POINTS, PEAK_POINTS = 0.36, 9.5, 6.0
STRIP_INCHES = 8.6
EXAMPLE_INCHES, EXAMPLE_POINTS = 0.25, 9.0
SIDE_CHARACTERS = 60  # of a snippet, before and after its token
NAMED_PEAKS = 12


@dataclass(frozen=True)
class Placed:
    """A token of a strip: its text, where it stands (inches from the left; line from the top), and how wide it is."""

    text: str
    x: float
    line: int
    width: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def token_strip(table: pa.Table, asked: Asked, *, first: int = 0, last: int | None = None) -> Picture:
    """Draw the text of a document, each token shaded by how strongly a feature fires; the strongest say the number.

    Raises InvalidInput for more than 2,000 tokens.
    """
    tokens = [one for one in table.to_pylist() if first <= one["pos"] and (last is None or one["pos"] <= last)]
    must_fit(len(tokens), STRIP_TOKENS, "tokens", "fewer positions: first=… and last=… (--first, --last)")
    must_fit(0 if tokens else 1, 0, "tokens, none of those asked for", "other positions")
    placed = _flow([(one["token"], one["seq"]) for one in tokens])
    activations = np.array([one["activation"] for one in tokens], dtype=np.float64)
    scale = Normalize(0, float(activations.max()) or 1)
    width = max(token.x + token.width for token in placed)
    lines = (placed[-1].line + 1) * LINE_INCHES
    height = max(lines, 0.9)
    fired = f"fires on {int((activations > 0).sum())} of {len(tokens)} tokens"
    title = f"Where feature {asked.parameter('feature')} fires"
    notes = (asked.parameter("sae"), f"document {asked.parameter('doc')}", fired)
    picture = new_picture(width + 0.75, height, title, notes, asked)
    axes = picture.place(MARGIN, MARGIN + height - lines, width, lines)
    axes.set(xlim=(0, width), ylim=(lines, 0))
    axes.axis("off")
    peaks = _peaks(placed, activations)
    for number, (token, activation) in enumerate(zip(placed, activations.tolist(), strict=True)):
        _shade(axes, token, activation, scale, named=number in peaks)
    key = min(height, 2.0)
    colour_key(picture, MARGIN + width + 0.15, MARGIN + height - key, key, scale, "activation")
    return picture


def _shade(axes: Axes, token: Placed, activation: float, scale: Normalize, *, named: bool) -> None:
    """Draw a token; where the feature fires, on its colour, and with the number above where it is `named`."""
    top, share = token.line * LINE_INCHES + 0.13, float(scale(activation))
    style: dict[str, Any] = {"fontsize": TOKEN_POINTS, "color": "#111111"}
    if activation > 0:
        axes.add_patch(Rectangle((token.x, top), token.width, 0.22, color=css_colour(share), lw=0))
        style["color"] = text_colour(share)
    axes.text(token.x, top + 0.16, token.text, **style)
    if named:
        axes.text(token.middle, top - 0.02, _number(activation), fontsize=PEAK_POINTS, ha="center", color=DIM)


def _peaks(placed: Sequence[Placed], activations: npt.NDArray[np.float64]) -> set[int]:
    """Return the tokens with the strongest activations, but for those whose number would touch a stronger one's."""
    chosen: dict[int, float] = {}  # token, half the width of its number
    for token in np.argsort(-activations, kind="stable")[:NAMED_PEAKS].tolist():
        here, half = placed[token], inches(_number(activations[token]), PEAK_POINTS) / 2 + 0.02
        beside = [(placed[one], other) for one, other in chosen.items() if placed[one].line == here.line]
        if activations[token] > 0 and all(abs(one.middle - here.middle) > half + other for one, other in beside):
            chosen[token] = half
    return set(chosen)


def _number(activation: float) -> str:
    return f"{activation:.2g}" if activation < 10 else f"{activation:.0f}"


def _flow(tokens: Iterable[tuple[str, int]]) -> list[Placed]:
    """Return where tokens (text, sequence) stand when they flow in lines.

    A line break in a token ends its line; a sequence begins one, since windows may repeat what the one before said.
    """
    placed, x, line, before = [], 0.0, 0, None
    for text, seq in tokens:
        shown = glyphs(one_line(text)) or "∅"
        width = _width(shown)
        if x and (x + width > STRIP_INCHES or seq != before):
            x, line = 0.0, line + 1
        placed.append(Placed(shown, x, line, min(width, STRIP_INCHES - x)))
        x, before = x + width, seq
        if text.endswith("\n"):
            x, line = 0.0, line + 1
    return placed


def _width(text: str) -> float:
    # Spaces at the ends have no ink, and are measured between two letters that have.
    return inches(f"|{text}|", TOKEN_POINTS) - inches("||", TOKEN_POINTS)


def concordance(table: pa.Table, asked: Asked) -> Picture:
    """Draw the strongest firings of a feature, a line each, the tokens below each other, shaded by activation.

    Raises InvalidInput for more than 100 of them.
    """
    rows = table.to_pylist()
    must_fit(len(rows), EXAMPLES, "examples", "-p k=100 or fewer")
    parts = [_split(one["example"], one["token"]) for one in rows]
    before, inside, after = (max(wide((part[n] for part in parts), EXAMPLE_POINTS), 0.2) for n in range(3))
    scale = Normalize(0, max(one["activation"] for one in rows) or 1)
    left = 0.77 + before
    width, height = left + inside + after + 0.85, EXAMPLE_INCHES * len(rows) + 0.22
    how = " most" if asked.query == "max_activating" else ", from strong to weak"
    title = f"What feature {asked.parameter('feature')} fires on{how}"
    picture = new_picture(width, height, title, (asked.parameter("sae"),), asked)
    axes = picture.place(MARGIN, MARGIN, width, height)
    axes.set(xlim=(0, width), ylim=(height - 0.22, -0.22))
    axes.axis("off")
    _aside(axes, 0.58, -0.1, "activation")
    _aside(axes, width, -0.1, "document")
    for number, (row, part) in enumerate(zip(rows, parts, strict=True)):
        y = (number + 0.5) * EXAMPLE_INCHES
        _aside(axes, 0.58, y, f"{row['activation']:.2f}")
        _aside(axes, width, y, str(row["doc"]))
        _example(axes, left, y, part, float(scale(row["activation"])))
    return picture


def _example(axes: Axes, left: float, y: float, part: tuple[str, str, str], share: float) -> None:
    """Draw one example so that its token, on its colour, begins at `left`."""
    ahead, token, behind = part
    style: dict[str, Any] = {"fontsize": EXAMPLE_POINTS, "va": "center"}
    box = inches(token, EXAMPLE_POINTS) + 0.06
    axes.add_patch(Rectangle((left - 0.03, y - 0.1), box, 0.2, color=css_colour(share), lw=0))
    axes.text(left - 0.06, y, ahead, ha="right", color="#333333", **style)
    axes.text(left, y, token, color=text_colour(share), **style)
    axes.text(left + box, y, behind, color="#333333", **style)


def _aside(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="right", va="center", fontsize=TEXT_POINTS - 1, color=DIM)


def _split(example: str, token: str) -> tuple[str, str, str]:
    """Return what stands before the marked token, the token, and what follows, cut to what a line holds."""
    found = MARKED.search(example)
    ahead, inside, behind = (
        (example[: found.start()], found[1], example[found.end() :]) if found else ("", token, example)
    )
    ahead, inside, behind = (glyphs(one_line(part)) for part in (ahead, inside, behind))
    cut_ahead = ahead if len(ahead) <= SIDE_CHARACTERS else "…" + ahead[-SIDE_CHARACTERS:]
    cut_behind = behind if len(behind) <= SIDE_CHARACTERS else behind[:SIDE_CHARACTERS] + "…"
    return cut_ahead.rstrip(), (inside.strip() or "␣")[:24], cut_behind
