"""The tables that have one line (or k) per row: tokens, predictions, reconstruction, lenses, attention, by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actstore.blocks import (
    FLAG_REPEAT,
    FLAG_SPECIAL,
    FLAG_TEMPLATE,
    LENS_IDS,
    LENS_VALUES,
    PREDICTION_IDS,
    PREDICTION_VALUES,
    RECONSTRUCTION_VALUES,
    TOKEN_FIELDS,
)

from .attention_parts import attention_tables
from .source import Segment, Source, row_numbers

__all__ = ["RowJob", "row_jobs"]

ShardTables = Mapping[str, pa.Table]
Matrix = npt.NDArray[Any]


@dataclass(frozen=True)
class RowJob:
    """A kind of row-keyed part: which artifact it holds, and how one shard of it becomes tables."""

    kind: str
    subject: str
    artifact: str
    tables: Callable[[int], ShardTables]

    @property
    def stem(self) -> str:
        return ".".join([self.kind, *filter(None, self.subject.split("/"))])


def row_jobs(source: Source) -> Iterator[RowJob]:
    """Yield every row-keyed kind that this source may have, firings apart."""
    small = source.tables()
    yield RowJob("tokens", "", "corpus/tokens", TokenTables(source).tables)
    yield RowJob("predictions", "", "predictions", lambda shard: _predictions(source, shard))
    for coder in small.get("saes", []):
        yield _reconstruction_job(source, str(coder["sae"]))
    for lens in small.get("lenses", []):
        yield _lens_job(source, f"{lens['lens']}/{lens['site']}")
    for stored in small.get("attention", []):
        yield _attention_job(source, int(stored["layer"]), float(stored["minimum"]))


class TokenTables:
    """Joins a shard's tokens with the display text, the document of each sequence, and the names of roles."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.vocabulary = source.vocabulary()
        self.roles = {int(role["code"]): str(role["role"]) for role in source.tables().get("roles", [])}
        self.segment: Segment | None = None
        self.documents_of_sequences: npt.NDArray[np.int64] = np.empty(0, np.int64)

    def tables(self, shard: int) -> ShardTables:
        """Return the tokens of one shard."""
        matrix = self.source.matrix("corpus/tokens", shard)
        fields = {name: matrix[:, place] for place, name in enumerate(TOKEN_FIELDS)}
        flags = fields["flags"]
        columns = {
            "row": row_numbers(self.source, shard, len(matrix)),
            "seq": fields["seq"].astype(np.int64),
            "doc": self._documents(shard, fields["seq"]),
            "pos": fields["pos"],
            "token_id": fields["token_id"],
            "token": self.vocabulary.take(pa.array(fields["token_id"])),
            "char_start": fields["char_start"],
            "char_end": fields["char_end"],
            "is_special": (flags & FLAG_SPECIAL) != 0,
            "is_template": (flags & FLAG_TEMPLATE) != 0,
            "is_repeat": (flags & FLAG_REPEAT) != 0,
            "role": self._roles(fields["role"]),
        }
        return {"tokens": pa.table(columns)}

    def _documents(self, shard: int, sequences: Matrix) -> npt.NDArray[np.int64]:
        if self.segment is None or not 0 <= shard - self.segment.first_shard < self.segment.n_shards:
            (self.segment,) = (s for s in self.source.segments() if 0 <= shard - s.first_shard < s.n_shards)
            self.documents_of_sequences = self.source.sequences(self.segment.segment)[:, 0]
        documents: npt.NDArray[np.int64] = self.documents_of_sequences[sequences - self.segment.first_seq]
        return documents

    def _roles(self, codes: Matrix) -> pa.Array:
        found, places = np.unique(codes, return_inverse=True)
        names = pa.array([None if code < 0 else self.roles.get(int(code), str(code)) for code in found], pa.string())
        return names.take(pa.array(places))


def _predictions(source: Source, shard: int) -> ShardTables:
    values = _columns(source.matrix("predictions/values", shard), PREDICTION_VALUES)
    ids = _columns(source.matrix("predictions/ids", shard), PREDICTION_IDS)
    last = ids["target_id"] < 0
    columns = {
        "row": row_numbers(source, shard, len(last)),
        "target_id": pa.array(ids["target_id"], mask=last),
        "target_logprob": _known(values["target_logprob"]),
        "entropy": _known(values["entropy"]),
        "top1_id": pa.array(ids["top1_id"], mask=np.isnan(values["top1_prob"])),
        "top1_prob": _known(values["top1_prob"]),
    }
    return {"predictions": pa.table(columns)}


def _reconstruction_job(source: Source, sae: str) -> RowJob:
    def tables(shard: int) -> ShardTables:
        values = _columns(source.matrix(f"reconstruction/{sae}", shard), RECONSTRUCTION_VALUES)
        rows = row_numbers(source, shard, len(values["l0"]))
        counts = pa.array(np.nan_to_num(values["l0"]).astype(np.int32), mask=np.isnan(values["l0"]))
        norms = {name: _known(values[name]) for name in ("norm", "error_norm")}
        return {"reconstruction": pa.table({"row": rows, "l0": counts, **norms})}

    return RowJob("reconstruction", sae, f"firings/{sae}", tables)


def _lens_job(source: Source, subject: str) -> RowJob:
    def tables(shard: int) -> ShardTables:
        values = source.matrix(f"lens/{subject}/values", shard)
        ids = source.matrix(f"lens/{subject}/ids", shard)
        rows = row_numbers(source, shard, len(values))
        top = _lens_tokens(rows, ids[:, len(LENS_IDS) :], values[:, len(LENS_VALUES) :])
        return {
            "lens_tokens": top,
            "lens_summary": _lens_summary(rows, _columns(ids, LENS_IDS), _columns(values, LENS_VALUES)),
        }

    return RowJob("lens", subject, f"lens/{subject}", tables)


def _attention_job(source: Source, layer: int, minimum: float) -> RowJob:
    def tables(shard: int) -> ShardTables:
        return attention_tables(source, layer, minimum, shard)

    return RowJob("attention", str(layer), f"attention/{layer}", tables)


def _lens_tokens(rows: npt.NDArray[np.int64], ids: Matrix, logprobs: Matrix) -> pa.Table:
    """Return the ranked tokens; a rank that has no log-probability is left out."""
    n_rows, n_ranks = ids.shape
    columns = {
        "row": np.repeat(rows, n_ranks),
        "rank": np.tile(np.arange(1, n_ranks + 1, dtype=np.int32), n_rows),
        "token_id": ids.reshape(-1),
        "logprob": logprobs.reshape(-1),
    }
    return pa.table(columns).filter(pa.array(~np.isnan(columns["logprob"])))


def _lens_summary(rows: npt.NDArray[np.int64], ids: Mapping[str, Matrix], values: Mapping[str, Matrix]) -> pa.Table:
    unranked = (ids["target_rank"] < 0) | np.isnan(values["target_logprob"])
    measured = {name: _known(values[name]) for name in LENS_VALUES}
    return pa.table({"row": rows, "target_rank": pa.array(ids["target_rank"], mask=unranked), **measured})


def _known(values: Matrix) -> pa.Array:
    """Return the values with NULL in place of NaN, which the arrays hold where nothing could be measured."""
    return pa.array(values, mask=np.isnan(values))


def _columns(matrix: Matrix, names: tuple[str, ...]) -> dict[str, Matrix]:
    return {name: np.ascontiguousarray(matrix[:, place]) for place, name in enumerate(names)}
