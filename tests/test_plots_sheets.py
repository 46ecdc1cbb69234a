"""Every picture: nothing overlaps or leaves the paper, grey readers see the same, and tokens are never obeyed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking_support import ALWAYS, RES
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from plots_support import attending_store, expression, strip_of

from actstore.api import Store
from actstore.plots import INK
from actstore.plots.colours import dark_text_on, lightness
from actstore.plots.sheet import Picture, shown_token

HOSTILE = [
    "$x_1$",
    "日本語",
    "🙂",
    "\x1b[31m",
    "<script>alert(1)</script>",
    "e\u0301",
    "",
    "   ",
    "\u202eabc",
    "w" * 80,
    "_^{\\",
]


@pytest.fixture(scope="module")
def attending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with attending_store(tmp_path_factory.mktemp("attention")) as store:
        yield store


ASKED: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "lens": ("logit_lens", {"doc": 5}, {}),
    "lens of odd text": ("logit_lens", {"doc": 0, "sites": "resid_post.*"}, {}),
    "lens, some positions": ("logit_lens", {"doc": 4, "sites": "resid_post.*"}, {"first": 3, "last": 9}),
    "trajectory": ("lens_trajectory", {"doc": 5}, {}),
    "trajectory of few": ("lens_trajectory", {"doc": 5}, {"first": 2, "last": 9}),
    "ranges": ("feature_stats", {"sae": RES, "k": 12}, {}),
    "histogram": ("activation_histogram", {"sae": RES, "feature": 9}, {}),
    "from strong to weak": ("examples_by_interval", {"sae": RES, "feature": 9}, {}),
    "expression in documents": ("feature_expression", {"sae": RES, "docs": "doc=4-30", "measure": "share"}, {}),
    "expression on tokens": ("token_expression", {"sae": RES, "docs": "doc=5", "k": 20}, {}),
    "concordance": ("max_activating", {"sae": RES, "feature": 9, "k": 12}, {}),
    "concordance of odd text": ("max_activating", {"sae": RES, "feature": ALWAYS, "k": 100, "per_document": 3}, {}),
    "strip": ("feature_in_document", {"sae": RES, "feature": ALWAYS, "doc": 4}, {}),
    "strip of odd text": ("feature_in_document", {"sae": RES, "feature": ALWAYS, "doc": 0}, {}),
    "pattern": ("attention_pattern", {"doc": 0, "layer": 1, "head": 2}, {}),
    "pattern, some positions": ("attention_pattern", {"doc": 0, "layer": 1, "head": 2}, {"first": 2, "last": 7}),
    "patterns of heads": ("attention_pattern", {"doc": 0, "layer": 0}, {}),
    "patterns of sequences": ("attention_pattern", {"doc": 3, "layer": 0, "head": 1}, {}),
    "scores": ("head_scores", {}, {}),
    "between": ("attention_between", {"from_tokens": "cat|hat", "to_tokens": "the"}, {}),
}


@pytest.fixture(scope="module", params=[*ASKED, "expression of many"])
def drawn(
    request: pytest.FixtureRequest, opened: Store, attending: Store, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Picture, Path]:
    """Every kind of picture, and the file that it was written to."""
    out = tmp_path_factory.mktemp("picture") / "picture.png"
    if request.param == "expression of many":
        return expression(200, 150).plot(out), out
    query, given, options = ASKED[request.param]
    store = attending if query.startswith(("attention", "head")) else opened
    return store.query(query, given).plot(out, **options), out


def texts_of(picture: Picture) -> list[Text]:
    """Return every text that has something to show; matplotlib keeps ticks outside of the axes, and draws them not."""
    hidden = set()
    for axes in picture.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high}
    found = [one for one in picture.findobj(Text) if isinstance(one, Text) and one.get_visible()]
    return [one for one in found if one.get_text().strip() and one not in hidden]


# Every picture


def test_a_picture_is_a_png_of_the_size_it_says(drawn: tuple[Picture, Path]) -> None:
    picture, out = drawn
    with Image.open(out) as image:
        assert image.format == "PNG"
        expected = np.round(picture.get_size_inches() * picture.dpi)
        assert np.abs(np.array(image.size) - expected).max() <= 1
        pixels = np.asarray(image.convert("L"))
    assert pixels.std() > 5  # not a blank sheet
    assert (pixels[[0, -1]] == 255).all() and (pixels[:, [0, -1]] == 255).all()  # ink keeps away from the edge


def test_no_text_leaves_the_paper_and_no_label_covers_another(drawn: tuple[Picture, Path]) -> None:
    picture, _ = drawn
    renderer = FigureCanvasAgg(picture).get_renderer()  # type: ignore[no-untyped-call]
    width, height = picture.get_size_inches() * picture.dpi
    shown = texts_of(picture)
    for one in shown:
        box = one.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, one.get_text()
    for axes in picture.axes:
        for labels, sides in ((axes.get_xticklabels(), ("x0", "x1")), (axes.get_yticklabels(), ("y0", "y1"))):
            boxes = [one.get_window_extent(renderer) for one in labels if one in shown]
            spans = sorted((getattr(box, sides[0]), getattr(box, sides[1])) for box in boxes)
            assert all(first[1] <= second[0] + 1 for first, second in pairwise(spans))


def test_a_title_and_the_store_are_on_every_picture(drawn: tuple[Picture, Path]) -> None:
    shown = [one.get_text() for one in drawn[0].texts]
    assert len(shown[0]) > 10
    assert ".act" in shown[1]


def test_no_axes_are_left_without_a_unit(attending: Store) -> None:
    """Every map has a key, and the key says what is measured."""
    picture = attending.query("head_scores").plot()
    keys: list[Axes] = [axes for axes in picture.axes if not axes.images]
    assert [axes.get_ylabel() for axes in keys] == ["nats", *["fraction of the attention"] * 4]


# Grey, colour-blind, and far away


def test_the_scale_darkens_in_even_steps() -> None:
    luminances = np.array([lightness(colour) for colour in INK])
    assert (np.diff(luminances) < 0).all()
    perceived = 116 * np.cbrt(luminances) - 16  # CIE L*
    steps = -np.diff(perceived)
    assert steps.max() / steps.min() < 1.6
    assert perceived[0] > 94 and perceived[-1] < 22


@pytest.mark.parametrize("share", np.linspace(0, 1, 21).tolist())
def test_text_on_the_scale_is_legible(share: float) -> None:
    ground = lightness(INK[round(share * 255)])
    ink = 0.0056 if dark_text_on(share) else 1.0  # of #111111 and #ffffff
    assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) >= 4.0


# Odd tokens


def test_tokens_are_drawn_as_they_are_and_never_obeyed(tmp_path: Path) -> None:
    picture = strip_of(HOSTILE).plot(tmp_path / "x.png")  # a missing glyph would warn, and warnings are errors
    shown = [text.get_text() for text in picture.axes[0].texts]
    assert "$x_1$" in shown and "<script>alert(1)</script>" in shown and "e" in "".join(shown)
    assert not any("\x1b" in text or "\u202e" in text for text in shown)
    assert all(text.get_parse_math() is False for text in texts_of(picture))


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (" the", "·the"),
        ("   ", "···"),
        ("", "∅"),
        (None, "∅"),
        ("\n", "⏎"),
        ("a\tb", "a⇥b"),
        ("\x00", "�"),
        ("\U0001f9d1", "▯"),
        ("x" * 40, "x" * 11 + "…"),
        ("$", "$"),
    ],
)
def test_a_token_as_a_label(token: str | None, label: str) -> None:
    assert shown_token(token) == label
