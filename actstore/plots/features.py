"""Pictures of features: how strongly they fire, and where, as gene-expression matrices are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize

from .asked import Asked
from .sheet import DIM, INK_MAP, MARGIN, Picture, colour_key, glyphs, heat, label_axis, must_fit, new_picture, wide
from .text import one_line

__all__ = ["activation_histogram", "feature_expression", "feature_ranges"]

SIDE = 400  # documents or features of an expression matrix
NAMED = 80  # of them with a name beside it
FEATURES = 100


def activation_histogram(table: pa.Table, asked: Asked) -> Picture:
    """Draw how often a feature fires how strongly: a bar for each bin (low, high], on a logarithmic scale of counts."""
    low, high, n_firings = (table[name].to_numpy().astype(np.float64) for name in ("low", "high", "n_firings"))
    total = f"{int(n_firings.sum()):,} firings on plain tokens"
    title = f"How strongly feature {asked.parameter('feature')} fires"
    picture = new_picture(6.4, 3.3, title, (asked.parameter("sae"), total), asked)
    axes = picture.place(MARGIN + 0.6, MARGIN + 0.42, 5.6, 2.8)
    colours = [INK_MAP(0.25 + 0.6 * share) for share in high / (high.max() or 1)]
    axes.bar(low, n_firings, width=high - low, align="edge", color=colours, edgecolor="#ffffff", lw=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda count, _: f"{count:,g}")
    axes.set(xlim=(0, float(high.max()) or 1), ylim=(0.6, max(float(n_firings.max()) * 1.6, 10)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("activation", color=DIM)
    axes.set_ylabel("firings (log scale)", color=DIM)
    return picture


def feature_ranges(table: pa.Table, asked: Asked) -> Picture:
    """Draw the activations of features: a dot at the median, a line to the 99th percentile, a bar at the strongest."""
    rows = [one for one in table.to_pylist() if one["n_firings"]]
    must_fit(len(rows), FEATURES, "features", "-k 100 or fewer")
    must_fit(0 if rows else 1, 0, "features, none of which ever fires", "another feature")
    names = [f"{one['feature']}{_named(one['label'])}" for one in rows]
    left, height = MARGIN + 0.12 + wide(names), 0.22 * len(rows)
    notes = (asked.parameter("sae"), "dot: median · line: to the 99th percentile · bar: strongest")
    picture = new_picture(left + 6.2, height + 0.55, "How strongly features fire", notes, asked)
    axes = picture.place(left, MARGIN + 0.4, 5.2, height)
    lines = np.arange(len(rows))
    middle, high, most = (np.array([one[name] for one in rows], float) for name in ("p50", "p99", "max_activation"))
    axes.hlines(lines, middle, high, color="#4d9f7d", lw=2.4)
    axes.plot(middle, lines, "o", color="#1d456d", ms=4.5)
    axes.plot(most, lines, "|", color="#1d456d", ms=8, mew=1.4)
    label_axis(axes, "y", lines.tolist(), names)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, float(most.max()) * 1.04))
    axes.grid(axis="x", color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("activation", color=DIM)
    for line, one in enumerate(rows):
        share = f"{one['density']:.2%}"
        axes.text(1.13, line, share, transform=axes.get_yaxis_transform(), va="center", ha="right", color=DIM)
    axes.text(1.13, -0.85, "of tokens", transform=axes.get_yaxis_transform(), ha="right", color=DIM)
    return picture


def feature_expression(table: pa.Table, asked: Asked) -> Picture:
    """Draw a matrix of documents (or tokens) × features, both in the order of their clustering, with its trees.

    Clustered by average linkage of Euclidean distances between square roots of activations. Raises InvalidInput for
    more than 400 on a side.
    """
    values, rows, features = _matrix(table)
    n_rows, n_features = values.shape
    must_fit(max(n_rows, n_features), SIDE, "documents or features on a side", "fewer of them: -p k=…")
    down, across = _tree(np.sqrt(values)), _tree(np.sqrt(values.T))
    values = values[down["leaves"]][:, across["leaves"]]
    row_names, feature_names = (
        [rows[place] for place in down["leaves"]],
        [features[place] for place in across["leaves"]],
    )
    named = n_rows <= NAMED, n_features <= NAMED
    cells = [0.17 if one else max(0.015, 6.5 / n) for one, n in zip(named, values.shape, strict=True)]
    width, height = max(n_features * cells[1], 1.2), max(n_rows * cells[0], 1.2)
    tree = 0.55
    right, bottom = 0.1 + (wide(row_names) if named[0] else 0.0), 0.3 + (wide(feature_names) if named[1] else 0.0)
    what = "tokens" if "row" in table.column_names else "documents"
    notes = (asked.parameter("sae"), f"{n_rows} {what} × {n_features} features, both clustered")
    title = "Which features fire where"
    picture = new_picture(tree + width + right + 0.8, tree + height + bottom, title, notes, asked)
    left, low = MARGIN + tree, MARGIN + bottom
    scale = Normalize(0, float(values.max()) or 1)
    axes = picture.place(left, low, width, height)
    heat(axes, values, scale, grid=max(cells) > 0.1 and min(cells) > 0.1)
    axes.yaxis.tick_right()
    label_axis(axes, "y", range(n_rows) if named[0] else [], row_names if named[0] else [])
    label_axis(axes, "x", range(n_features) if named[1] else [], feature_names if named[1] else [], rotation=90)
    axes.set_xlabel("feature", color=DIM)
    _draw_tree(picture.place(left, low + height + 0.03, width, tree - 0.1), across, lying=False)
    _draw_tree(picture.place(MARGIN, low, tree - 0.08, height), down, lying=True)
    key = min(height, 2.0)
    colour_key(picture, left + width + right + 0.1, low + height - key, key, scale, "activation")
    return picture


def _named(label: str | None) -> str:
    return f"  {glyphs(one_line(label))[:40]}" if label else ""


def _matrix(table: pa.Table) -> tuple[npt.NDArray[np.float64], list[str], list[str]]:
    """Return the matrix (document or token, feature) with 0 where nothing fires, and the names of both sides."""
    by = "row" if "row" in table.column_names else "doc"
    rows, down = np.unique(table[by].to_numpy(), return_inverse=True)
    features, across = np.unique(table["feature"].to_numpy(), return_inverse=True)
    values = np.zeros((len(rows), len(features)))
    values[down, across] = table["activation"].cast(pa.float64()).fill_null(0).to_numpy()
    return values, [str(row) for row in rows], [str(feature) for feature in features]


def _tree(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return SciPy's description of the tree over lines: `leaves` in order, and the coordinates of its branches."""
    from scipy.cluster.hierarchy import dendrogram, linkage

    if len(values) < 2:
        return {"leaves": [0], "icoord": [], "dcoord": []}
    return dict(dendrogram(linkage(values, "average", optimal_ordering=len(values) <= 200), no_plot=True))


def _draw_tree(axes: Axes, tree: dict[str, Any], *, lying: bool) -> None:
    along, away = np.array(tree["icoord"]), np.array(tree["dcoord"])
    axes.axis("off")
    if not len(along):
        return
    ends, deepest = (0, 10 * len(tree["leaves"])), (0, float(away.max()) * 1.02 or 1)
    points = np.stack([away, along] if lying else [along, away], axis=2)
    axes.add_collection(LineCollection(list(points), colors="#8a8a8a", linewidths=0.7))
    axes.set(xlim=deepest[::-1] if lying else ends, ylim=ends[::-1] if lying else deepest)
