"""Ground truth per row, and the single SAE feature that predicts it best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import capture
import grammar
import numpy as np
from numpy.typing import NDArray

# question -> (label, value of its spans or None for any)
QUESTIONS: dict[str, tuple[str, str | None]] = {
    **{f"topic {topic}": ("topic", topic) for topic in grammar.TOPICS},
    "list stop": ("list_stop", None),
    "repeated name": ("repeated_name", None),
    "sentiment positive": ("sentiment_due", "positive"),
    "sentiment negative": ("sentiment_due", "negative"),
}


@dataclass(frozen=True)
class Predictor:
    """A feature and the activation from which it says yes, with its F1 where chosen and on the held-out half."""

    site: str
    feature: int
    threshold: float
    chosen_f1: float
    held_out_f1: float


def row_labels(
    rows: capture.Rows, documents: Sequence[grammar.Document], label: str, value: str | None
) -> NDArray[np.bool_]:
    """bool [rows]: the token shares a letter with a span of this label (and value)."""
    stride = 1 + max(len(document.text) for document in documents)
    spans = [
        (index * stride + span.start, index * stride + span.end)
        for index, document in enumerate(documents)
        for span in document.spans
        if span.label == label and value in (None, span.value)
    ]
    start, end = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    # Tokens are in text order: a span begins at the first token that ends after its start.
    change = np.zeros(len(rows.document) + 1, dtype=np.int64)
    np.add.at(change, np.searchsorted(rows.document * stride + rows.char_end, start, side="right"), 1)
    np.add.at(change, np.searchsorted(rows.document * stride + rows.char_start, end, side="left"), -1)
    labels: NDArray[np.bool_] = np.cumsum(change[:-1]) > 0
    return labels


def f1_score(predicted: NDArray[np.bool_], actual: NDArray[np.bool_]) -> float:
    """2 TP / (predicted + actual); 0 where neither occurs."""
    total = int(predicted.sum() + actual.sum())
    return 2 * int((predicted & actual).sum()) / total if total else 0.0


@dataclass(frozen=True)
class Ranked:
    """Every firing of some rows, by feature and then by falling activation; `first` is where its feature begins."""

    feature: NDArray[np.int64]
    row: NDArray[np.int64]
    activation: NDArray[np.float32]
    first: NDArray[np.int64]


def ranked(features: NDArray[np.float32]) -> Ranked:
    """The firings of `features` [rows, d_sae], ranked."""
    row, feature = np.nonzero(features)
    activation = features[row, feature]
    order = np.lexsort((-activation, feature))
    feature = feature[order]
    return Ranked(feature, row[order], activation[order], np.searchsorted(feature, feature, side="left"))


def best_feature(firings: Ranked, actual: NDArray[np.bool_]) -> tuple[int, float, float]:
    """(feature, threshold, F1) of the best rule "activation >= threshold" over all features and thresholds."""
    feature, activation, first = firings.feature, firings.activation, firings.first
    hits = np.concatenate(([0], np.cumsum(actual[firings.row])))
    true_positives = hits[1:] - hits[first]
    f1 = 2 * true_positives / (np.arange(len(feature)) - first + 1 + actual.sum())
    # Equal activations of one feature stand or fall together.
    tied = (feature[:-1] == feature[1:]) & (activation[:-1] == activation[1:])
    f1[:-1][tied] = 0.0
    best = int(np.argmax(f1))
    return int(feature[best]), float(activation[best]), float(f1[best])


def best_predictors(
    features_by_site: dict[str, NDArray[np.float32]], rows: capture.Rows, documents: Sequence[grammar.Document]
) -> dict[str, Predictor]:
    """For every question the feature that is best on even documents, scored on odd documents; all plain rows count."""
    chosen = rows.document % 2 == 0
    labels = {question: row_labels(rows, documents, *asked) for question, asked in QUESTIONS.items()}
    found: dict[str, Predictor] = {}
    for site, features in features_by_site.items():
        firings = ranked(features[chosen])
        for question, actual in labels.items():
            feature, threshold, f1 = best_feature(firings, actual[chosen])
            if question not in found or f1 > found[question].chosen_f1:
                held_out = f1_score(features[~chosen, feature] >= threshold, actual[~chosen])
                found[question] = Predictor(site, feature, threshold, f1, held_out)
    return {question: found[question] for question in QUESTIONS}
