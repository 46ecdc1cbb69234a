"""Pictures: what is drawn is the data, in its order and by its names."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from asking_support import RES
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from plots_support import attending_store, expression, strip_of
from scipy.cluster.hierarchy import leaves_list, linkage

from actstore.api import Store
from actstore.plots import Asked, css_colour
from actstore.plots.sheet import glyphs, shown_token
from actstore.results import Result


@pytest.fixture(scope="module")
def attending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with attending_store(tmp_path_factory.mktemp("attention")) as store:
        yield store


def matrix_of(axes: Axes) -> np.ndarray:
    """Return the matrix that axes show, NaN where nothing is drawn."""
    return np.ma.filled(np.ma.asarray(axes.images[0].get_array(), dtype=np.float64), np.nan)


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
    assert numbers.keys() == {(x, y) for x in range(6) for y in range(3)}
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
