"""Answers to draw: a matrix of features in documents, a strip of tokens, a store with attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from asking_support import RES
from attention_support import case_model, extract

import actstore
from actstore.api import Store
from actstore.plots import Asked
from actstore.results import Result


@contextmanager
def attending_store(folder: Path) -> Iterator[Store]:
    """A random Gemma 2 over ragged texts, three keys kept of each row."""
    extract(case_model("gemma_2"), folder / "a.act")
    with actstore.open(folder / "a.act") as store:
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
