"""A small truth in memory for the index's tests, and the same questions answered by plain numpy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actstore.blocks import RowFirings
from actstore.index import TABLES, Catalog, open_index, read_catalog

SHARD_ROWS = 64
VOCABULARY = ["<bos>", "the", " cat", "'quoted\"", "ünï\0", "\n", ""] + [f"t{i}" for i in range(33)]
HALF, WIDE = "half-sae", "wide.sae__l0-9"
N_FEATURES = {HALF: 40, WIDE: 300}
LENS = ("logit", "resid_post.1")
N_RANKS = 3
ORDERED = {table: f"FROM {table} ORDER BY ALL" for table in TABLES}


@dataclass(frozen=True)
class FakeSegment:
    segment: int
    first_doc: int
    n_docs: int
    first_seq: int
    n_seqs: int
    first_shard: int
    n_shards: int


class FakeSource:
    """Seeded random rows: so many shards in each segment, with filler, all kinds of flags and dead features."""

    shard_rows = SHARD_ROWS

    def __init__(self, segments_shards: Sequence[int] = (3, 2), seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.found_segments: list[FakeSegment] = []
        self.found_sequences: list[np.ndarray] = []
        self.tokens: dict[int, np.ndarray] = {}
        self.matrices: dict[tuple[str, int], np.ndarray] = {}
        self.firings_of: dict[tuple[str, int], RowFirings] = {}
        self.receipts: dict[str, dict[int, str]] = {}
        self.logits: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.given_labels: list[tuple[str, int, str]] = []
        self.saes = [HALF, WIDE]
        for n_shards in segments_shards:
            self.add_segment(n_shards)

    # ---- making

    def add_segment(self, n_shards: int) -> None:
        number = len(self.found_segments)
        shard = len(self.tokens)
        first_seq = sum(s.n_seqs for s in self.found_segments)
        first_doc = sum(s.n_docs for s in self.found_segments)
        sequences: list[tuple[int, int, int]] = []
        for position in range(shard, shard + n_shards):
            lengths = [20, 13, 25] if position % 2 else [30, 1, 17]
            self._add_shard(position, lengths, first_seq + len(sequences))
            for place, n_tokens in enumerate(lengths):
                row = position * SHARD_ROWS + sum(lengths[:place])
                sequences.append((first_doc + (len(sequences)) // 2, row, n_tokens))
        n_docs = sequences[-1][0] + 1 - first_doc
        self.found_segments.append(FakeSegment(number, first_doc, n_docs, first_seq, len(sequences), shard, n_shards))
        self.found_sequences.append(np.array(sequences, np.int64))

    def _add_shard(self, shard: int, lengths: Sequence[int], first_seq: int) -> None:
        n_rows = sum(lengths)
        pos = np.concatenate([np.arange(n) for n in lengths])
        seq = first_seq + np.repeat(np.arange(len(lengths)), lengths)
        flags = self.random.choice([0, 0, 0, 2, 4, 6], n_rows)
        flags[pos == 0] = 1
        token_id = self.random.integers(1, len(VOCABULARY), n_rows)
        token_id[pos == 0] = 0
        role = self.random.integers(-1, 2, n_rows)
        self.tokens[shard] = np.stack([token_id, seq, pos, pos * 3, pos * 3 + 3, flags, role], 1).astype(np.int32)
        self.receipts.setdefault("corpus/tokens", {})[shard] = f"tokens-{shard}"

    def extract(self, *shards: int, saes: Sequence[str] = (HALF, WIDE)) -> None:
        """Make predictions, lens and firings of shards, as a pass would."""
        for shard in shards:
            n_rows = len(self.tokens[shard])
            last = np.append(self.tokens[shard][1:, 2] == 0, True)
            values = self.random.normal(size=(n_rows, 3)).astype(np.float32)
            ids = self.random.integers(0, 40, (n_rows, 2)).astype(np.int32)
            values[last, 0], ids[last, 0] = np.nan, -1
            lens_ids = self.random.integers(0, 40, (n_rows, 1 + N_RANKS)).astype(np.int32)
            lens_values = self.random.normal(size=(n_rows, 3 + N_RANKS)).astype(np.float32)
            lens_ids[last, 0], lens_values[last, 0] = -1, np.nan
            lens = "/".join(("lens", *LENS))
            self.matrices |= {("predictions/values", shard): values, ("predictions/ids", shard): ids}
            self.matrices |= {(f"{lens}/values", shard): lens_values, (f"{lens}/ids", shard): lens_ids}
            self.receipts.setdefault("predictions", {})[shard] = f"p{shard}"
            self.receipts.setdefault(lens, {})[shard] = f"l{shard}"
            for sae in saes:
                self.encode(sae, shard)

    def encode(self, sae: str, shard: int, receipt: str = "r") -> None:
        """Make the firings of one shard: none on special rows, ties and equal activations among them."""
        flags = self.tokens[shard][:, 5]
        fires = self.random.random((len(flags), N_FEATURES[sae])) < 0.25
        fires[:, ::7] = False  # dead features
        fires[:, 1] = True  # one that fires everywhere
        fires[flags & 1 == 1] = False
        rows, features = np.nonzero(fires)
        activations = self.random.choice(np.arange(1, 60) / 8, len(rows)).astype(np.float32)
        if sae == WIDE:
            activations = np.where(features % 2, activations * np.float32(1.1), activations)
        counts = np.append(fires.sum(1), np.zeros(SHARD_ROWS - len(flags) if sae == HALF else 0, np.int64))
        indptr = np.concatenate([[0], np.cumsum(counts)])
        kind = np.uint8 if N_FEATURES[sae] <= 256 else np.uint16
        self.firings_of[sae, shard] = RowFirings(indptr, features.astype(kind), activations)
        reconstruction = np.stack([fires.sum(1), self.random.random(len(flags)), self.random.random(len(flags))], 1)
        self.matrices[f"reconstruction/{sae}", shard] = reconstruction.astype(np.float32)
        self.receipts.setdefault(f"firings/{sae}", {})[shard] = f"{receipt}{shard}"

    def compute_logits(self, sae: str) -> None:
        ids = self.random.integers(0, 40, (N_FEATURES[sae], 6)).astype(np.int32)
        self.logits[sae] = ids, self.random.normal(size=ids.shape).astype(np.float32)

    # ---- Source

    def tables(self) -> Mapping[str, list[dict[str, Any]]]:
        return {
            "store": [
                {"model": "m", "shards_done": self._n_done(), "shards_total": len(self.tokens), "versions": {"a": "1"}}
            ],
            "passes": [{"pass": "p", "recipe": {"context": 30}, "digest": "d", "done": self._n_done(), "total": 5}],
            "sites": [
                {"site": "resid_post.1", "kind": "resid_post", "layer": 1, "width": 8, "dtype": "float32", "pass": "p"}
            ],
            "saes": [{"sae": sae, "site": "resid_post.1", "layer": 1, "width": N_FEATURES[sae]} for sae in self.saes],
            "health": [{"name": "fvu", "subject": HALF, "value": 0.25, "expected": "≤ 1", "ok": None}],
            "lenses": [{"lens": LENS[0], "site": LENS[1]}],
            "roles": [{"code": 0, "role": "user"}],
        }

    def _n_done(self) -> int:
        return len(self.receipts.get("predictions", {}))

    def vocabulary(self) -> pa.Array:
        return pa.array(VOCABULARY)

    def segments(self) -> Sequence[FakeSegment]:
        return self.found_segments

    def document(self, doc: int) -> dict[str, Any]:
        metadata = json.dumps({"topic": f"it's {doc}"})
        parent, variant = (None, None) if doc % 2 else (doc, "negated")
        return {
            "text": f"text ü {doc}",
            "n_tokens": doc + 3,
            "metadata": metadata,
            "parent": parent,
            "variant": variant,
        }

    def documents(self, segment: int) -> Iterator[pa.RecordBatch]:
        chosen = self.found_segments[segment]
        types = {"doc": pa.int64(), "segment": pa.int32(), "text": pa.string(), "n_tokens": pa.int64()}
        types |= {"metadata": pa.string(), "parent": pa.int64(), "variant": pa.string()}
        for doc in range(chosen.first_doc, chosen.first_doc + chosen.n_docs):
            row = {"doc": doc, "segment": segment, **self.document(doc)}
            yield pa.RecordBatch.from_pylist([row], pa.schema(types))

    def sequences(self, segment: int) -> np.ndarray:
        return self.found_sequences[segment]

    def done(self, artifact: str) -> Mapping[int, str]:
        return dict(self.receipts.get(artifact, {}))

    def matrix(self, path: str, shard: int) -> np.ndarray:
        return self.tokens[shard] if path == "corpus/tokens" else self.matrices[path, shard]

    def firings(self, sae: str, shard: int) -> RowFirings:
        return self.firings_of[sae, shard]

    def feature_logits(self, sae: str) -> tuple[np.ndarray, np.ndarray] | None:
        return self.logits.get(sae)

    def labels(self) -> list[tuple[str, int, str]]:
        return self.given_labels

    # ---- the same, said plainly

    def all_firings(self, sae: str) -> list[tuple[int, int, float, bool]]:
        """Return (feature, row, activation, plain) of every firing, one by one."""
        found = []
        for shard in sorted(self.receipts.get(f"firings/{sae}", {})):
            firings = self.firings_of[sae, shard]
            for place, flags in enumerate(self.tokens[shard][:, 5]):
                for at in range(firings.indptr[place], firings.indptr[place + 1]):
                    row = shard * SHARD_ROWS + place
                    found.append((int(firings.features[at]), row, float(firings.activations[at]), flags == 0))
        return sorted(found)

    def plain_rows(self, sae: str) -> int:
        return sum(int((self.tokens[shard][:, 5] == 0).sum()) for shard in self.receipts[f"firings/{sae}"])


def hashes(directory: Any) -> dict[str, str]:
    """Return the SHA-256 of every file in a directory."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir() if path.is_file()}


def content(directory: Path, catalog: Catalog | None = None) -> dict[str, Any]:
    """Return every row of every table, as text so that NaN equals NaN."""
    with open_index(catalog or read_catalog(directory), lambda name: directory / name, threads=1) as connection:
        return {table: str(connection.sql(query).table.to_pydict()) for table, query in ORDERED.items()}
