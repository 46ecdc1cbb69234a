"""What travels: arrays that a pass makes for one shard, and the declarations of what it will make.

The extraction loop fills blocks and hands them to a writer; the writer knows the format, the loop does not.
Axes: `row` is a token of a sequence; every matrix here is (row, column), or (row, head, column), over the whole shard,
filler included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidInput, explain

__all__ = [
    "ATTENTION_VALUES",
    "FLAG_REPEAT",
    "FLAG_SPECIAL",
    "FLAG_TEMPLATE",
    "HEAD_METRICS",
    "LENS_IDS",
    "LENS_VALUES",
    "PREDICTION_IDS",
    "PREDICTION_VALUES",
    "RECONSTRUCTION_VALUES",
    "TOKEN_FIELDS",
    "FiringsSpec",
    "MatrixSpec",
    "RowFirings",
    "Segment",
    "ShardBlock",
    "TokenShard",
    "artifact_of",
    "is_plain",
    "scales_path",
]

TOKEN_FIELDS = ("token_id", "seq", "pos", "char_start", "char_end", "flags", "role")
FLAG_SPECIAL, FLAG_TEMPLATE, FLAG_REPEAT = 1, 2, 4
PREDICTION_VALUES = ("target_logprob", "entropy", "top1_prob")
PREDICTION_IDS = ("target_id", "top1_id")  # target_id is -1 on a sequence's last row
RECONSTRUCTION_VALUES = ("l0", "norm", "error_norm")
LENS_VALUES = ("target_logprob", "entropy", "kl_to_final")  # then the k log-probabilities
LENS_IDS = ("target_rank",)  # then the k token ids; target_rank is -1 on a sequence's last row
HEAD_METRICS = ("entropy", "previous_token", "self_attention", "bos_attention", "induction")
ATTENTION_VALUES = ("kept_weight", *HEAD_METRICS)

Matrix = npt.NDArray[Any]


def is_plain(flags: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
    """Return for each row whether it counts in statistics, examples and health: no flag is set."""
    return np.asarray(flags == 0)


def artifact_of(path: str) -> str:
    """Return the artifact that a path below `arrays/` or `firings/` belongs to: what is listed and dropped as one."""
    kind, *rest = path.split("/")
    if kind == "predictions":
        return kind
    if kind in ("reconstruction", "firings"):
        return f"firings/{rest[0]}"
    if kind == "scales":
        return f"sites/{rest[0]}"
    return "/".join((kind, *rest[: 2 if kind == "lens" else 1]))


def scales_path(path: str) -> str:
    """Return where the scales of a quantised site lie: `sites/<site>` → `scales/<site>`."""
    return f"scales/{path.removeprefix('sites/')}"


def _refuse_path(name: str) -> None:
    """Raise InvalidInput for a name that would leave the store: a foreign store's declarations are read too."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*", name):
        accepted = "letters, digits, '.', '_', '-' and '/', no part of which begins with '.'"
        raise InvalidInput(explain(f"{name!r} cannot be the name of stored values", accepted=accepted))


@dataclass(frozen=True)
class MatrixSpec:
    """A row-keyed matrix of the store: its path below `arrays/`, its columns and its type.

    With `n_heads` it is (row, head, column): so many columns for every head of a layer.
    """

    path: str
    n_columns: int
    dtype: str  # "float32", "bfloat16", "int8" or "int32"
    column_axis: str  # the second dimension's name
    columns: tuple[str, ...] = ()  # names of the columns where they have any
    per_column_chunks: bool = False  # each column compressed alone: for columns of unlike content
    n_heads: int | None = None
    compressed: bool = True

    def __post_init__(self) -> None:
        _refuse_path(self.path)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row: (column), or (head, column)."""
        return (self.n_columns,) if self.n_heads is None else (self.n_heads, self.n_columns)

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of all dimensions."""
        return ("row", self.column_axis) if self.n_heads is None else ("row", "head", self.column_axis)


@dataclass(frozen=True)
class FiringsSpec:
    """The firings of one SAE: `n_features` columns, CSR per shard."""

    sae: str
    n_features: int

    def __post_init__(self) -> None:
        _refuse_path(self.sae)


@dataclass(frozen=True)
class RowFirings:
    """Firings of one shard in CSR form: row r holds `features[indptr[r]:indptr[r+1]]`, increasing.

    indptr int64 (row + 1); features unsigned, any width (firing); activations float32 (firing), all > 0.
    """

    indptr: npt.NDArray[np.int64]
    features: npt.NDArray[Any]
    activations: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        n_firings = int(self.indptr[-1])
        if not len(self.features) == len(self.activations) == n_firings:
            raise InvalidInput(
                explain(f"{len(self.features)} features, {len(self.activations)} activations and {n_firings} by indptr")
            )

    @property
    def n_rows(self) -> int:
        return len(self.indptr) - 1

    def rows(self) -> npt.NDArray[np.int64]:
        """Return the row, counted from the shard's first, of every firing: int64 (firing)."""
        return np.repeat(np.arange(self.n_rows, dtype=np.int64), np.diff(self.indptr))


@dataclass(frozen=True)
class TokenShard:
    """The tokens of one shard: int32 (row, field) with the fields of `TOKEN_FIELDS`; filler has token_id -1."""

    shard: int
    values: npt.NDArray[np.int32]

    @property
    def n_rows(self) -> int:
        """Rows in use; the rest of the shard is filler."""
        return int(np.count_nonzero(self.column("token_id") >= 0))

    def column(self, name: str) -> npt.NDArray[np.int32]:
        """Return one field of every row, filler included: int32 (row)."""
        return self.values[:, TOKEN_FIELDS.index(name)]


@dataclass(frozen=True)
class ShardBlock:
    """Everything that one pass made for one shard, ready to be written."""

    shard: int
    n_rows: int  # rows in use
    matrices: Mapping[str, Matrix]  # by MatrixSpec.path
    firings: Mapping[str, RowFirings]  # by SAE id
    provenance: Mapping[str, Any] = field(default_factory=dict)  # device, dtypes, versions, splits: into the receipt


@dataclass(frozen=True)
class Segment:
    """Documents that were added together: which numbers of documents, sequences and shards are theirs."""

    segment: int
    first_doc: int
    n_docs: int
    first_seq: int
    n_seqs: int
    first_shard: int
    n_shards: int
    n_rows: int  # rows in use, filler left out
    documents_digest: str
