"""What an extraction will cost, before it begins: rows, shards, bytes of every artifact, free disk."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actstore.blocks import LENS_VALUES, FiringsSpec, MatrixSpec, artifact_of
from actstore.errors import NoSpace, explain

__all__ = ["BYTES_PER_FIRING", "BYTES_PER_INDEX_FIRING", "Plan", "Size", "check_disk", "estimate"]

# A little above what benchmarks/extract.py and benchmarks/query.py print: see docs/benchmarks.md.
BYTES_PER_FIRING = 3.5
BYTES_PER_INDEX_FIRING = 4.3
BYTES_PER_SCALE = 0.8  # compressed, of float32: benchmarks/storage.py
BYTES_PER_INDEX_ROW = {"predictions": 19.0, "reconstruction": 11.0}
BYTES_PER_INDEX_LENS = 20.0, 12.0  # a row, and each of its k tokens
BYTES_PER_INDEX_ATTENTION = 8.0, 5.2  # a row of a head, and each of its k keys, if all are heavy enough
BYTES_PER_FEATURE = 100.0, 1000.0  # the tokens that it raises and lowers most, and its statistics in the index
PATTERN_SHARE = 0.5  # of a pattern's bytes: no token looks ahead, and zeros compress to nothing
BYTES_PER_TOKEN = 24.0, 16.0  # of the corpus: tokens and text, and their index
ASSUMED_L0 = 100.0  # where a source does not declare one: what Gemma Scope's canonical SAEs aim at
DISK_SHARE = 0.9


@dataclass(frozen=True)
class Size:
    """An artifact and the bytes that it is expected to take."""

    artifact: str
    n_bytes: int


@dataclass(frozen=True)
class Plan:
    """Rows, shards and bytes of an extraction; dense arrays are counted uncompressed, scales apart."""

    n_documents: int
    n_rows: int
    n_shards: int
    artifacts: tuple[Size, ...]
    index_bytes: int
    kit_bytes: int
    free_bytes: int
    edges_per_token: int = 0  # of attention: layers · heads · keys kept

    @property
    def total_bytes(self) -> int:
        return sum(size.n_bytes for size in self.artifacts) + self.index_bytes + self.kit_bytes

    def __str__(self) -> str:
        edges = f" with {self.edges_per_token} edges of attention each" if self.edges_per_token else ""
        return (
            f"{self.n_shards} shards with {self.n_rows} tokens{edges} are to be made, of {self.n_documents} documents "
            f"in all: about {self.total_bytes / 1e9:.2f} GB with index and kit; {self.free_bytes / 1e9:.1f} GB are free"
        )


def estimate(
    *,
    n_documents: int,
    n_rows: int,
    n_shards: int,
    matrices: tuple[MatrixSpec, ...],
    firings: tuple[FiringsSpec, ...],
    l0: dict[str, float | None],
    kit_bytes: int,
    with_corpus: bool,
    out: Path,
) -> Plan:
    """Return the plan of a pass; `l0` is each SAE's declared mean number of firings a row."""
    sizes: dict[str, float] = {}
    index = n_rows * sum(_index_bytes_a_row(spec) for spec in matrices)
    if with_corpus:
        sizes["corpus"] = n_rows * BYTES_PER_TOKEN[0]
        index += n_rows * BYTES_PER_TOKEN[1]
    for spec in matrices:
        n_bytes = n_rows * math.prod(spec.row_shape) * _item_bytes(spec)
        sizes[artifact_of(spec.path)] = sizes.get(artifact_of(spec.path), 0) + n_bytes
    for one in firings:
        n_firings = n_rows * (l0.get(one.sae) or ASSUMED_L0)
        n_bytes = n_firings * BYTES_PER_FIRING + one.n_features * BYTES_PER_FEATURE[0]
        sizes[f"firings/{one.sae}"] = sizes.get(f"firings/{one.sae}", 0) + n_bytes
        index += n_firings * BYTES_PER_INDEX_FIRING + one.n_features * BYTES_PER_FEATURE[1]
    artifacts = tuple(Size(name, int(n_bytes)) for name, n_bytes in sizes.items())
    edges = sum(math.prod(spec.row_shape) for spec in matrices if _is_edges(spec))
    return Plan(n_documents, n_rows, n_shards, artifacts, int(index), kit_bytes, free_bytes(out), edges)


def _item_bytes(spec: MatrixSpec) -> float:
    if spec.path.startswith("scales/"):
        return BYTES_PER_SCALE
    item_bytes = 2 if spec.dtype == "bfloat16" else np.dtype(spec.dtype).itemsize
    return item_bytes * (PATTERN_SHARE if spec.path.startswith("sites/pattern.") else 1)


def _index_bytes_a_row(spec: MatrixSpec) -> float:
    """Return what the index takes for a row of a matrix; dense sites are not in it."""
    kind = spec.path.split("/")[0]
    if kind == "lens" and spec.path.endswith("/values"):
        return BYTES_PER_INDEX_LENS[0] + (spec.n_columns - len(LENS_VALUES)) * BYTES_PER_INDEX_LENS[1]
    if _is_edges(spec):
        return (spec.n_heads or 0) * (BYTES_PER_INDEX_ATTENTION[0] + spec.n_columns * BYTES_PER_INDEX_ATTENTION[1])
    return BYTES_PER_INDEX_ROW.get(kind, 0.0) if not spec.path.endswith("/ids") else 0.0


def _is_edges(spec: MatrixSpec) -> bool:
    return spec.path.startswith("attention/") and spec.path.endswith("/weights")


def free_bytes(path: Path) -> int:
    """Return the free space where a path is, or will be."""
    existing = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def check_disk(plan: Plan, *, force: bool) -> None:
    """Raise NoSpace where a plan would take more than 90 % of the free disk, unless `force`."""
    if plan.total_bytes > DISK_SHARE * plan.free_bytes and not force:
        largest = max(plan.artifacts, key=lambda size: size.n_bytes)  # a pass makes one at least
        raise NoSpace(
            explain(
                f"The extraction would take about {plan.total_bytes / 1e9:.1f} GB "
                f"(most: {largest.artifact}, {largest.n_bytes / 1e9:.1f} GB); {plan.free_bytes / 1e9:.1f} GB are free",
                accepted=f"at most {DISK_SHARE:.0%} of the free disk",
                next_step="ask for fewer sites, --max-tokens, --storage-dtype int8, another disk, or add --force",
            )
        )
