"""Pictures: what is drawn is the data, nothing overlaps or leaves the paper, and grey readers see the same."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from asking_support import ALWAYS, DEAD, RES, SmallStore
from attention_support import case_model, extract
from click.testing import CliRunner
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image
from scipy.cluster.hierarchy import leaves_list, linkage

import actstore
from actstore.api import Store
from actstore.cli import main
from actstore.errors import InvalidInput, MissingDependency, QueryError
from actstore.plots import INK, Asked, css_colour
from actstore.plots.colours import dark_text_on, lightness
from actstore.plots.sheet import Picture, glyphs, shown_token
from actstore.results import Result

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
    """A random Gemma 2 over ragged texts, three keys kept of each row."""
    path = tmp_path_factory.mktemp("attention") / "a.act"
    extract(case_model("gemma_2"), path)
    with actstore.open(path) as store:
        yield store


def expression(n_docs: int = 30, n_features: int = 20) -> Result:
    """Return activations of features in documents, some missing, as the query `feature_expression` gives them."""
    random = np.random.default_rng(1)
    doc, feature = np.divmod(np.flatnonzero(random.random(n_docs * n_features) < 0.6), n_features)
    columns = {"doc": doc, "feature": feature * 7, "activation": random.random(len(doc)).astype(np.float32)}
    table = pa.table(columns | {"label": pa.nulls(len(doc), pa.string())})
    return Result(table, asked=Asked("feature_expression", {"sae": RES}, "a model, x.act"))


def strip_of(tokens: list[str]) -> Result:
    activations = np.linspace(0, 5, len(tokens)).astype(np.float32)
    columns = {"seq": [0] * len(tokens), "pos": range(len(tokens)), "row": range(len(tokens)), "token": tokens}
    table = pa.table({name: list(column) for name, column in columns.items()} | {"activation": activations})
    return Result(table, asked=Asked("feature_in_document", {"sae": RES, "feature": 9, "doc": 0}))


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


def matrix_of(axes: Axes) -> np.ndarray:
    """Return the matrix that axes show, NaN where nothing is drawn."""
    return np.ma.filled(np.ma.asarray(axes.images[0].get_array(), dtype=np.float64), np.nan)


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


# What is drawn is the data


def test_the_lens_grid_is_the_answer(opened: Store) -> None:
    result = opened.query("logit_lens", {"doc": 5, "sites": "resid_post.*"})
    (axes, _) = result.plot().axes
    rows = result.rows()
    columns = sorted({row["row"] for row in rows})
    shares = np.full((6, len(columns)), np.nan)
    for row in rows:
        shares[5 - row["layer"], columns.index(row["row"])] = np.exp(row["logprob"])
    np.testing.assert_allclose(matrix_of(axes), shares)
    written = {(text.get_position()): text.get_text() for text in axes.texts}
    assert written == {(columns.index(row["row"]), 5 - row["layer"]): shown_token(row["token"]) for row in rows}
    assert [one.get_text() for one in axes.get_yticklabels()] == [f"resid_post.{layer}" for layer in range(5, -1, -1)]
    inputs = {row["row"]: (row["input"], row["pos"]) for row in rows}
    expected = [f"{shown_token(inputs[row][0])}\n{inputs[row][1]}" for row in columns]
    assert [one.get_text() for one in axes.get_xticklabels()] == expected
    came = sum(inputs.get(row["row"] + 1, ("",))[0] == row["token"] for row in rows)
    assert came and len(axes.patches) == came


def test_a_token_that_came_is_framed_where_its_place_is_not_shown(opened: Store) -> None:
    result = opened.query("logit_lens", {"doc": 5, "sites": "resid_post.5"})
    every = {round(patch.get_x()) for patch in result.plot().axes[0].patches if isinstance(patch, Rectangle)}
    last = max(every)
    cut = result.plot(last=last).axes[0]
    assert {round(patch.get_x()) for patch in cut.patches if isinstance(patch, Rectangle)} == every


def test_the_deepest_site_is_on_top_whatever_its_kind(opened: Store) -> None:
    """A layer's resid_pre comes before its resid_mid, and that before its resid_post."""
    axes = opened.query("logit_lens", {"doc": 5}).plot().axes[0]
    found = [one.get_text() for one in axes.get_yticklabels()]
    deep = [f"resid_post.{layer}" for layer in range(5, 2, -1)], [f"resid_post.{layer}" for layer in range(2, -1, -1)]
    assert found == [*deep[0], "resid_mid.3", *deep[1], "resid_pre.0"]


def test_a_lens_grid_that_is_wider_than_a_page_goes_on_below(opened: Store) -> None:
    result = opened.query("logit_lens", {"doc": 4, "sites": "resid_post.[05]"})
    picture = result.plot()
    lines = [axes for axes in picture.axes if axes.images]
    assert len(lines) > 2 and picture.get_size_inches()[0] < 27
    rows = result.rows()
    columns = sorted({row["row"] for row in rows})
    for site, place in (("resid_post.5", 0), ("resid_post.0", 1)):
        shares = np.concatenate([matrix_of(axes)[place] for axes in lines])
        np.testing.assert_allclose(shares, [np.exp(row["logprob"]) for row in rows if row["site"] == site])
    inputs = {row["row"]: f"{shown_token(row['input'])}\n{row['pos']}" for row in rows}
    assert [one.get_text() for axes in lines for one in axes.get_xticklabels()] == [inputs[row] for row in columns]


def test_a_trajectory_through_several_sites_of_a_layer_is_in_the_order_of_depth() -> None:
    sites = {"resid_mid.0": -0.5, "resid_post.0": 0.0, "resid_pre.0": -1.0, "resid_mid.1": 0.5, "resid_post.1": 1.0}
    columns: dict[str, Any] = {"site": list(sites), "layer": [int(site[-1]) for site in sites], "seq": [0] * 5}
    columns |= {"pos": [0] * 5, "row": [0] * 5, "input": ["a"] * 5, "target_rank": [3, 4, 5, 2, 1]}
    columns |= {name: [0.3, 0.4, 0.1, 0.5, 0.6] for name in ("target_probability", "entropy", "kl_to_final")}
    panels = Result(pa.table(columns), asked=Asked("lens_trajectory")).plot().axes
    assert [np.asarray(line.get_xdata()).tolist() for line in panels[0].lines] == [[-1, -0.5, 0, 0.5, 1]]
    assert [np.asarray(line.get_ydata()).tolist() for line in panels[0].lines] == [[5, 3, 4, 2, 1]]
    assert "resid_mid" in panels[0].get_xlabel()


def test_the_trajectory_is_the_answer(opened: Store) -> None:
    result = opened.query("lens_trajectory", {"doc": 5})
    rows = [row for row in result.rows() if 2 <= row["pos"] <= 9]
    panels = result.plot(first=2, last=9).axes
    for axes, name in zip(panels, ("target_rank", "target_probability", "entropy", "kl_to_final"), strict=True):
        expected = [
            [row[name] for row in rows if row["row"] == wanted] for wanted in sorted({row["row"] for row in rows})
        ]
        found = [np.asarray(line.get_ydata()).tolist() for line in axes.lines]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    several = result.plot().axes[2]
    by_layer = [[row["entropy"] for row in result.rows() if row["layer"] == layer] for layer in range(6)]
    np.testing.assert_allclose(np.asarray(several.lines[0].get_ydata()), [np.median(one) for one in by_layer])


@pytest.mark.parametrize("options", [{}, {"first": 2, "last": 7}], ids=str)
@pytest.mark.parametrize("head", [None, 3])
def test_a_pattern_is_the_answer(attending: Store, head: int | None, options: dict[str, Any]) -> None:
    result = attending.query("attention_pattern", {"doc": 0, "layer": 2, "head": head})
    first, last = options.get("first", 0), options.get("last", 10_000)
    panels = [axes for axes in result.plot(**options).axes if axes.images]
    heads = sorted({row["head"] for row in result.rows()})
    assert len(panels) == len(heads) == (6 if head is None else 1)
    for axes, number in zip(panels, heads, strict=True):
        found = matrix_of(axes)
        expected = np.where(np.tri(len(found), dtype=bool), 0, np.nan)
        for row in result.rows():
            if row["head"] == number and first <= row["key_pos"] <= row["pos"] <= last:
                expected[row["pos"] - first, row["key_pos"] - first] = row["weight"]
        np.testing.assert_array_equal(found, expected)
        assert len(found) == min(last, max(row["pos"] for row in result.rows())) - first + 1
    names = [one.get_text() for one in panels[0].get_yticklabels()]
    known = {row["pos"]: row["token"] for row in result.rows()}
    assert names == [known[first + place] for place in range(len(names))]


def test_the_maps_of_heads_are_the_answers(attending: Store) -> None:
    scores = attending.query("head_scores")
    panels = [axes for axes in scores.plot().axes if axes.images]
    names = ("entropy", "previous_token", "self_attention", "bos_attention", "induction")
    assert [axes.get_title(loc="left").replace(" ", "_") for axes in panels] == list(names)
    for axes, name in zip(panels, names, strict=True):
        np.testing.assert_allclose(matrix_of(axes), scores.numpy()[name].reshape(3, 6)[::-1])
        assert len({axes.images[0].norm.vmax for axes in panels[1:]}) == 1  # fractions are compared
    between = attending.query("attention_between", {"from_tokens": "cat"})
    (axes,) = [axes for axes in between.plot().axes if axes.images]
    expected = np.zeros((3, 6))
    for row in between.rows():
        expected[2 - row["layer"], row["head"]] = row["mean_weight"]
    np.testing.assert_allclose(matrix_of(axes), expected)
    numbers = {text.get_position(): float(text.get_text()) for text in axes.texts}
    assert all(numbers[x, y] == pytest.approx(expected[int(y), int(x)], abs=0.0051) for x, y in numbers)


def test_the_histogram_is_the_answer(opened: Store) -> None:
    result = opened.query("activation_histogram", {"sae": RES, "feature": 9})
    (axes,) = result.plot().axes
    bars = [(one.get_x(), one.get_width(), one.get_height()) for one in axes.patches if isinstance(one, Rectangle)]
    expected = [(row["low"], row["high"] - row["low"], row["n_firings"]) for row in result.rows()]
    np.testing.assert_allclose(bars, expected)
    assert "firings" in axes.get_ylabel() and "activation" in axes.get_xlabel()


def test_an_expression_matrix_is_the_answer_in_the_order_of_its_clusters() -> None:
    result = expression()
    axes = result.plot().axes[0]
    rows = [int(one.get_text()) for one in axes.get_yticklabels()]
    features = [int(one.get_text()) for one in axes.get_xticklabels()]
    dense = np.zeros((30, 20))
    for one in result.rows():
        dense[one["doc"], one["feature"] // 7] = one["activation"]
    expected = dense[rows][:, [feature // 7 for feature in features]]
    np.testing.assert_allclose(matrix_of(axes), expected)
    roots = np.sqrt(dense)
    assert rows == leaves_list(linkage(roots, "average", optimal_ordering=True)).tolist()
    assert [one // 7 for one in features] == leaves_list(linkage(roots.T, "average", optimal_ordering=True)).tolist()
    trees = [one for axes in result.plot().axes for one in axes.collections if isinstance(one, LineCollection)]
    assert sorted(len(one.get_segments()) for one in trees if len(one.get_segments()) > 1) == [19, 29]


def test_an_expression_on_tokens_keeps_the_order_of_the_text(opened: Store) -> None:
    result = opened.query("token_expression", {"sae": RES, "docs": "doc=5", "features": "7-12"})
    axes = result.plot().axes[0]
    rows = {row["row"]: f"{shown_token(row['token'])}  {row['pos']}" for row in result.rows()}
    assert [one.get_text() for one in axes.get_yticklabels()] == list(rows.values())
    features = [int(one.get_text()) for one in axes.get_xticklabels()]
    cells = {(row["row"], row["feature"]): row["activation"] for row in result.rows()}
    np.testing.assert_array_equal(matrix_of(axes), [[cells[row, one] for one in features] for row in rows])


def test_features_are_called_by_their_labels() -> None:
    table = pa.table({"doc": [0, 1], "feature": [3, 4], "activation": [1.0, 2.0], "label": ["$tea$", None]})
    axes = Result(table, asked=Asked("feature_expression")).plot().axes[0]
    assert {one.get_text() for one in axes.get_xticklabels()} == {"3  $tea$", "4"}


def test_a_strip_shades_each_token_by_its_activation(opened: Store) -> None:
    result = opened.query("feature_in_document", {"sae": RES, "feature": 9, "doc": 4})
    (axes, _) = result.plot().axes
    rows = result.rows()
    most = max(row["activation"] for row in rows)
    colours = [to_hex(one.get_facecolor()) for one in axes.patches]
    assert colours and colours == [css_colour(row["activation"] / most) for row in rows if row["activation"]]
    tokens = [text.get_text() for text in axes.texts if float(text.get_fontsize()) > 8]
    assert "".join(tokens) == "".join(glyphs(row["token"].replace("\n", "⏎")) for row in rows)
    peaks = [float(text.get_text()) for text in axes.texts if float(text.get_fontsize()) < 8]
    assert max(peaks) == pytest.approx(most, rel=0.06)


def test_the_numbers_of_a_strip_never_touch_and_a_sequence_begins_a_line(opened: Store) -> None:
    crowded = strip_of([" a"] * 40).plot()
    renderer = FigureCanvasAgg(crowded).get_renderer()  # type: ignore[no-untyped-call]
    numbers = [one.get_window_extent(renderer) for one in crowded.axes[0].texts if float(one.get_fontsize()) < 8]
    assert 1 < len(numbers) < 12 and not any(first.overlaps(second) for first, second in combinations(numbers, 2))
    result = opened.query("feature_in_document", {"sae": RES, "feature": 9, "doc": 4})
    first = [number for number, row in enumerate(result.rows()) if row["pos"] == 0]
    tokens = [text for text in result.plot().axes[0].texts if float(text.get_fontsize()) > 8]
    assert len(first) > 2 and {tokens[number].get_position()[0] for number in first} == {0}


def test_the_lines_of_an_expression_say_what_they_are(opened: Store) -> None:
    assert expression().plot().axes[0].get_ylabel() == "document"
    on_tokens = opened.query("token_expression", {"sae": RES, "docs": 5, "k": 5}).plot().axes[0]
    assert (on_tokens.get_ylabel(), on_tokens.get_xlabel()) == ("token and its position", "feature")


def test_a_concordance_has_the_tokens_below_each_other(opened: Store) -> None:
    result = opened.query("max_activating", {"sae": RES, "feature": 9, "k": 12})
    (axes,) = result.plot().axes
    most = max(row["activation"] for row in result.rows())
    assert [to_hex(one.get_facecolor()) for one in axes.patches] == [
        css_colour(row["activation"] / most) for row in result.rows()
    ]
    assert len({one.get_x() for one in axes.patches if isinstance(one, Rectangle)}) == 1
    shown = [text.get_text() for text in axes.texts]
    assert [f"{row['activation']:.2f}" in shown and str(row["doc"]) in shown for row in result.rows()] == [True] * 12


def test_ranges_are_the_quantiles(opened: Store) -> None:
    result = opened.query("feature_stats", {"sae": RES, "k": 12})
    (axes,) = result.plot().axes
    rows = [row for row in result.rows() if row["n_firings"]]
    medians, strongest = (np.asarray(line.get_xdata()) for line in axes.lines)
    np.testing.assert_allclose(medians, [row["p50"] for row in rows])
    np.testing.assert_allclose(strongest, [row["max_activation"] for row in rows])
    assert [one.get_text() for one in axes.get_yticklabels()] == [str(row["feature"]) for row in rows]


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


# What cannot be drawn


@pytest.mark.parametrize(
    ("query", "given", "options", "message"),
    [
        (
            "document_features",
            {"doc": 4, "sae": RES},
            {},
            r"'document_features' has no picture. Accepted: .*logit_lens",
        ),
        ("logit_lens", {"doc": 3}, {"firts": 1}, r"does not know firts. Accepted: first, last"),
        ("max_activating", {"sae": RES, "feature": 9}, {"first": 1}, r"does not know first. Accepted: no options"),
        ("logit_lens", {"doc": 3}, {"first": 400}, r"none of those asked for"),
        ("feature_in_document", {"doc": 3, "sae": RES, "feature": 9}, {"first": 400}, r"none of those asked for"),
        ("max_activating", {"sae": RES, "feature": ALWAYS, "k": 101}, {}, r"101 examples. Accepted: at most 100"),
        ("feature_stats", {"sae": RES, "k": 200}, {}, r"features. Accepted: at most 100"),
        ("activation_histogram", {"sae": RES, "feature": DEAD}, {}, r"none of which ever fires"),
        ("logit_lens", {"doc": 3, "sites": "nosuch"}, {}, r"Nothing is stored that the lens"),
    ],
)
def test_what_has_no_picture_says_so(
    opened: Store, query: str, given: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        opened.query(query, given).plot(**options)


def test_a_large_picture_is_refused_with_what_to_do(opened: Store) -> None:
    columns: dict[str, Any] = {"site": ["resid_post.0"] * 4001, "layer": [0] * 4001, "rank": [1] * 4001}
    columns |= {name: list(range(4001)) for name in ("row", "pos")} | {"seq": [0] * 4001}
    columns |= {"input": ["a"] * 4001, "token": ["b"] * 4001, "logprob": [-1.0] * 4001}
    with pytest.raises(InvalidInput, match=r"4,001 cells of text. Accepted: at most 4,000. Next: fewer positions"):
        Result(pa.table(columns), asked=Asked("logit_lens")).plot()
    with pytest.raises(InvalidInput, match=r"401 lines or features on a side"):
        expression(401, 12).plot()
    with pytest.raises(InvalidInput, match=r"2,001 tokens"):
        strip_of(["a"] * 2001).plot()


def test_an_answer_that_is_cut_or_is_not_named_has_no_picture(opened: Store, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"cut at 5 rows. Next: raise the limit"):
        opened.query("logit_lens", {"doc": 3}, limit=5).plot()
    with pytest.raises(QueryError, match="An answer to SQL has no picture"):
        opened.sql("SELECT 1").plot()
    with pytest.raises(InvalidInput, match=r"not written as 'x.doc'. Accepted: .png, .pdf, .svg"):
        opened.lens("logit", doc=3).plot(tmp_path / "x.doc")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_install_line_is_said(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"pip install 'actstore\[plot\]'"):
        opened.lens("logit", doc=3).plot()


# Doors


@pytest.mark.parametrize("ending", ["pdf", "svg"])
def test_pictures_can_be_printed(opened: Store, tmp_path: Path, ending: str) -> None:
    opened.lens("logit", doc=3).plot(tmp_path / f"x.{ending}")
    head = (tmp_path / f"x.{ending}").read_bytes()[:400]
    assert head.startswith(b"%PDF") if ending == "pdf" else b"<svg" in head


def test_a_notebook_shows_the_picture_by_itself(opened: Store) -> None:
    assert opened.lens("logit", doc=3).plot()._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ["query", "logit_lens", "-p", "doc=3", "--last", "5"],
        ["query", "lens_trajectory", "-p", "doc=3"],
        ["lens", "--doc", "3", "--first", "1", "--last", "4"],
        ["top", RES, "9", "-k", "5"],
        ["stats", RES],
        ["stats", RES, "--feature", "9"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_commands_draw(small: SmallStore, tmp_path: Path, arguments: list[str]) -> None:
    command, *rest = arguments
    out = tmp_path / "picture.png"
    result = CliRunner().invoke(main, [command, str(small.path), *rest, "--plot", str(out)])
    assert result.exit_code == 0, result.output
    with Image.open(out) as image:
        assert f"{out}: {image.width} × {image.height} pixels" in result.stdout


def test_a_command_that_cannot_draw_says_why(small: SmallStore, tmp_path: Path) -> None:
    arguments = ["query", str(small.path), "token_features", "-p", f"sae={RES}", "-p", "row=3"]
    result = CliRunner().invoke(main, [*arguments, "--plot", str(tmp_path / "x.png")])
    assert result.exit_code == 1 and "'token_features' has no picture" in result.stderr


def test_asking_imports_no_matplotlib(small: SmallStore) -> None:
    program = (
        "import sys, actstore\n"
        f"store = actstore.open({str(small.path)!r})\n"
        "store.lens('logit', doc=3)._repr_html_()\n"
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_no_axes_are_left_without_a_unit(attending: Store) -> None:
    """Every map has a key, and the key says what is measured."""
    picture = attending.query("head_scores").plot()
    keys: list[Axes] = [axes for axes in picture.axes if not axes.images]
    assert [axes.get_ylabel() for axes in keys] == ["nats", *["fraction of the attention"] * 4]
