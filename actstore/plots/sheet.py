"""The paper that pictures are drawn on, measured in inches: nothing overlaps, and every size follows the data."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from matplotlib.ticker import MaxNLocator

from actstore.errors import InvalidInput, explain

from .asked import Asked
from .colours import INK, dark_text_on
from .text import one_line

__all__ = [
    "DIM",
    "DPI",
    "HEAD",
    "INK_MAP",
    "MARGIN",
    "PAPER",
    "TEXT_POINTS",
    "Picture",
    "colour_key",
    "glyphs",
    "heat",
    "inches",
    "label_axis",
    "must_fit",
    "new_picture",
    "shown_token",
    "styled",
    "text_colour",
    "wide",
]

DPI = 144
TEXT_POINTS, TITLE_POINTS = 8.0, 10.5
PAPER, DIM = "#ffffff", "#5a5a5a"
MARGIN = 0.16  # inches
HEAD = 0.62  # inches for title and note
INK_MAP = ListedColormap(INK, name="actstore")

# Fonts that are asked, in this order, for what DejaVu Sans does not have; those that are not installed are left out.
OTHER_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans",
    "Noto Emoji",
    "Arial Unicode MS",
)
MISSING = "▯"  # stands for a character that no font has


class Picture(Figure):
    """A matplotlib figure that a notebook shows by itself, whatever its backend."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()

    def place(self, left: float, bottom: float, width: float, height: float, **options: Any) -> Axes:
        """Return axes whose inside is this rectangle, in inches from the lower left corner."""
        across, up = self.get_size_inches()
        axes: Axes = self.add_axes((left / across, bottom / up, width / across, height / up), **options)
        return axes

    def write(self, x: float, y: float, text: str, **options: Any) -> None:
        """Write a text at a place in inches from the lower left corner."""
        across, up = self.get_size_inches()
        self.text(x / across, y / up, text, **options)


def styled() -> Any:
    """Return the context in which pictures are made: fonts, thin grey frames, `$` a character like any other."""
    return rc_context(
        {
            "font.family": list(_families()),
            "font.size": TEXT_POINTS,
            "text.parse_math": False,
            "axes.edgecolor": "#8a8a8a",
            "axes.linewidth": 0.6,
            "axes.labelsize": TEXT_POINTS,
            "axes.titlesize": TEXT_POINTS,
            "xtick.labelsize": TEXT_POINTS - 0.5,
            "ytick.labelsize": TEXT_POINTS - 0.5,
            "xtick.color": "#333333",
            "ytick.color": "#333333",
            "xtick.major.size": 2.5,
            "ytick.major.size": 2.5,
            "figure.dpi": DPI,
            "savefig.dpi": DPI,
        }
    )


def new_picture(width: float, height: float, title: str, notes: Iterable[str], asked: Asked) -> Picture:
    """Return a picture whose body is width × height inches, below a title, a note, and the store's name."""
    note = " · ".join(one for one in (*notes, asked.source) if one)
    needed = max(inches(title, TITLE_POINTS, bold=True), inches(glyphs(note), TEXT_POINTS)) + 2 * MARGIN
    across, up = (math.ceil(side * DPI) / DPI for side in (max(width + 2 * MARGIN, needed), height + HEAD + MARGIN))
    picture = Picture(figsize=(across, up), dpi=DPI, facecolor=PAPER)
    top = picture.get_size_inches()[1] - MARGIN
    picture.write(MARGIN, top, glyphs(title), size=TITLE_POINTS, weight="bold", va="top")
    picture.write(MARGIN, top - 0.22, glyphs(note), size=TEXT_POINTS, color=DIM, va="top")
    return picture


def heat(axes: Axes, values: npt.NDArray[np.float64], scale: Normalize, *, grid: bool = False) -> None:
    """Draw a matrix (line, column) from the top down, on the scale; NaN stays paper. A grid sets large cells apart."""
    axes.imshow(values, cmap=INK_MAP, norm=scale, aspect="auto", interpolation="nearest")
    axes.tick_params(length=0)
    if grid:
        lines, columns = values.shape
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(lines + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=PAPER, lw=0.8)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)


def text_colour(share: float) -> str:
    """Return the colour of a text on a share of the scale."""
    return "#111111" if share != share or dark_text_on(share) else "#ffffff"


def colour_key(picture: Picture, left: float, bottom: float, height: float, scale: Normalize, label: str) -> None:
    """Draw the key of a scale, standing, with its unit."""
    bar = picture.colorbar(ScalarMappable(scale, INK_MAP), cax=picture.place(left, bottom, 0.1, height))
    n_ticks = 5 if height > 0.9 else 2
    if isinstance(scale, PowerNorm):  # even steps of colour, not of the value
        values = [float(scale.inverse(share)) for share in np.linspace(0, 1, n_ticks + 1)]
        bar.ax.set_yticks(values, [f"{value:.2g}" for value in values])
    else:
        bar.ax.yaxis.set_major_locator(MaxNLocator(n_ticks))
    bar.outline.set_visible(False)
    bar.set_label(label, color=DIM)


def label_axis(axes: Axes, which: str, places: Sequence[float], labels: Sequence[str], **options: Any) -> None:
    """Label places of the axis "x" or "y" with texts that are taken as they are."""
    set_ticks = axes.set_xticks if which == "x" else axes.set_yticks
    set_ticks(list(places), list(labels), parse_math=False, **options)


def must_fit(n_cells: int, limit: int, what: str, next_step: str) -> None:
    """Raise InvalidInput where a picture would have more cells than can be read."""
    if n_cells > limit:
        size = f"The picture would have {n_cells:,} {what}"
        raise InvalidInput(explain(size, accepted=f"at most {limit:,}", next_step=next_step))


def shown_token(text: str | None, n_characters: int = 12) -> str:
    """Return a token as a label: spaces at its beginning as ·, cut, and only of characters that can be drawn."""
    line = one_line(text or "")
    bare = line.lstrip(" ")
    line = glyphs("·" * (len(line) - len(bare)) + bare) or "∅"
    return line if len(line) <= n_characters else line[: n_characters - 1] + "…"


def glyphs(text: str) -> str:
    """Return a text in which a character that no installed font draws is a box; accents without a base are left out."""
    return "".join(one if _drawable(one) else "" if unicodedata.combining(one) else MISSING for one in text)


def wide(texts: Iterable[str], points: float = TEXT_POINTS) -> float:
    """Return how wide the widest of some texts is drawn, in inches."""
    return max((inches(text, points) for text in set(texts)), default=0.0)


def inches(text: str, points: float, *, bold: bool = False) -> float:
    """Return how wide a text is drawn, in inches."""
    properties = FontProperties(family=list(_families()), size=points, weight="bold" if bold else "normal")
    width, _, _ = TextToPath().get_text_width_height_descent(text, properties, ismath=False)
    return float(width) / 72


@cache
def _families() -> tuple[str, ...]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in OTHER_FONTS if name in installed))


@cache
def _characters() -> frozenset[int]:
    """Return the code points that the fonts draw."""
    paths = [font_manager.findfont(FontProperties(family=[name])) for name in _families()]
    maps: list[Mapping[int, int]] = [font_manager.get_font(path).get_charmap() for path in paths]
    return frozenset().union(*maps)


@cache
def _drawable(character: str) -> bool:
    return ord(character) in _characters()
