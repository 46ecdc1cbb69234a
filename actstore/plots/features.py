"""Pictures of features: how strongly they fire, and where, as gene-expression matrices are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm

from .asked import Asked
from .sheet import (
    DIM,
    INK_MAP,
    MARGIN,
    Picture,
    colour_key,
    glyphs,
    heat,
    label_axis,
    must_fit,
    new_picture,
    shown_token,
    wide,
)
from .text import one_line

__all__ = ["activation_histogram", "feature_expression", "feature_ranges", "token_expression"]

SIDE = 400  # documents or features of an expression matrix
NAMED = 128  # of them with a name beside it
FEATURES = 100
LINES = {"documents": "document", "tokens": "token and its position"}
MEASURES = {"mean": "mean activation", "max": "highest activation", "share": "share of tokens"}


@dataclass(frozen=True)
class Matrix:
    """Activations (document or token, feature), and what its lines and columns are called."""

    values: npt.NDArray[np.float64]
    rows: Sequence[str]
    features: Sequence[str]


def activation_histogram(table: pa.Table, asked: Asked) -> Picture:
    """Draw how often a feature fires how strongly: a bar for each bin, on a logarithmic scale of counts.

    Raises InvalidInput for a feature that never fires.
    """
    low, high, n_firings = (table[name].to_numpy().astype(np.float64) for name in ("low", "high", "n_firings"))
    must_fit(0 if n_firings.sum() else 1, 0, "features, none of which ever fires", "another feature")
    total = f"{int(n_firings.sum()):,} firings on plain tokens"
    title = f"How strongly feature {asked.parameter('feature')} fires"
    picture = new_picture(6.4, 3.3, title, (asked.parameter("sae"), total), asked)
    axes = picture.place(MARGIN + 0.6, MARGIN + 0.42, 5.6, 2.8)
    colours = [INK_MAP(0.25 + 0.6 * share) for share in high / high.max()]
    axes.bar(low, n_firings, width=high - low, align="edge", color=colours, edgecolor="#ffffff", lw=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda count, _: f"{count:,g}")
    axes.set(xlim=(0, float(high.max())), ylim=(0.6, max(float(n_firings.max()) * 1.6, 10)))
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
    left, height = MARGIN + 0.12 + wide([*names, "feature"]), 0.22 * len(rows)
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
    for place, head in ((-0.012, "feature"), (1.13, "of tokens")):
        axes.text(place, -0.85, head, transform=axes.get_yaxis_transform(), ha="right", color=DIM)
    return picture


def feature_expression(table: pa.Table, asked: Asked) -> Picture:
    """Draw a matrix of documents × features, both in the order of their clustering, with its trees.

    Clustered by average linkage of Euclidean distances between square roots of activations, as they are shown. Raises
    InvalidInput for more than 400 on a side.
    """
    matrix = _matrix(table, "doc", [str(doc) for doc in np.unique(table["doc"].to_numpy())])
    unit = MEASURES.get(asked.parameter("measure"), "activation")
    return _expression(matrix, "documents", unit, asked, cluster_rows=True)


def token_expression(table: pa.Table, asked: Asked) -> Picture:
    """Draw a matrix of tokens × features: tokens in the order of the text, features in the order of their clustering.

    Clustered as in `feature_expression`. Raises InvalidInput for more than 400 on a side.
    """
    known = {one["row"]: one for one in table.select(["row", "pos", "token"]).to_pylist()}
    matrix = _matrix(table, "row", [f"{shown_token(one['token'])}  {one['pos']}" for _, one in sorted(known.items())])
    return _expression(matrix, "tokens", "activation", asked, cluster_rows=False)


def _expression(matrix: Matrix, what: str, unit: str, asked: Asked, *, cluster_rows: bool) -> Picture:
    down, across = _tree(np.sqrt(matrix.values)), _tree(np.sqrt(matrix.values.T))
    if not cluster_rows:
        down = {"leaves": list(range(len(matrix.rows))), "icoord": [], "dcoord": []}
    values = matrix.values[down["leaves"]][:, across["leaves"]]
    named = [side <= NAMED for side in values.shape]
    row_names = [matrix.rows[place] for place in down["leaves"]] if named[0] else []
    feature_names = [matrix.features[place] for place in across["leaves"]] if named[1] else []
    cells = [0.17 if one else max(0.015, 6.5 / n) for one, n in zip(named, values.shape, strict=True)]
    height, width = (max(n * inch, 1.2) for n, inch in zip(values.shape, cells, strict=True))
    left, right, bottom = 0.55 if cluster_rows else 0.1, 0.3 + wide(row_names), 0.3 + wide(feature_names)

    n_rows, n_features = values.shape
    order = "both clustered" if cluster_rows else "features clustered"
    notes = (asked.parameter("sae"), f"{n_rows} {what} × {n_features} features, {order}")
    picture = new_picture(left + width + right + 0.8, 0.55 + height + bottom, "Which features fire where", notes, asked)
    left, bottom = left + MARGIN, bottom + MARGIN
    scale = PowerNorm(0.5, 0, float(values.max()) or 1)
    axes = picture.place(left, bottom, width, height)
    heat(axes, values, scale, grid=min(cells) > 0.1)
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    label_axis(axes, "y", range(len(row_names)), row_names)
    label_axis(axes, "x", range(len(feature_names)), feature_names, rotation=90)
    axes.set_xlabel("feature", color=DIM)
    axes.set_ylabel(LINES[what], color=DIM)
    _draw_tree(picture.place(left, bottom + height + 0.03, width, 0.45), across, lying=False)
    _draw_tree(picture.place(MARGIN, bottom, left - MARGIN - 0.08, height), down, lying=True)
    key = min(height, 2.0)
    colour_key(picture, left + width + right + 0.05, bottom + height - key, key, scale, f"{unit} (square-root scale)")
    return picture


def _named(label: str | None) -> str:
    return f"  {glyphs(one_line(label))[:30]}" if label else ""


def _matrix(table: pa.Table, by: str, rows: Sequence[str]) -> Matrix:
    """Return the matrix of a table in long form, its lines by the column `by`; 0 where nothing fires."""
    numbers, down = np.unique(table[by].to_numpy(), return_inverse=True)
    features, across = np.unique(table["feature"].to_numpy(), return_inverse=True)
    must_fit(max(len(numbers), len(features)), SIDE, "lines or features on a side", "fewer: -p docs=doc=0-99, -p k=50")
    values = np.zeros((len(numbers), len(features)))
    values[down, across] = table["activation"].cast(pa.float64()).fill_null(0).to_numpy()
    labels = {one["feature"]: one["label"] for one in table.select(["feature", "label"]).to_pylist()}
    return Matrix(values, rows, [f"{feature}{_named(labels[feature])}" for feature in features.tolist()])


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
