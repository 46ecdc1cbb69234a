"""What a store holds: `store.json`, written once, and `layout.json`, replaced when it grows (docs/format.md §3, §4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Self

from actstore.blocks import FiringsSpec, MatrixSpec, Segment, artifact_of
from actstore.errors import UnsupportedFormat, explain
from actstore.recipe import ModelIdentity, Recipe

from .shapes import (
    Artifact,
    Count,
    Digest,
    MetadataPath,
    Owner,
    PassId,
    PieceName,
    StoredPath,
    read_as,
    read_fields,
    refusing,
)

__all__ = ["CORPUS_PASS", "FORMAT", "VERSION", "FileProof", "Layout", "PassFile", "StoreFile"]

FORMAT, VERSION = "actstore", 1
MOST_SHARDS = 10_000_000  # as many as an index holds
CORPUS_PASS = "corpus"  # tokenising is a pass too: its manifest proves the rows


@dataclass(frozen=True)
class FileProof:
    """A file as it was written: its size, the SHA-256 of its bytes and of the values that they decode to.

    Of a shard that is not compressed also the SHA-256 of its chunks' checksums.
    """

    bytes: Count
    sha256: Digest
    values_sha256: Digest | None = None
    chunks_sha256: Digest | None = None


@dataclass(frozen=True)
class StoreFile:
    """`store.json`: what never changes in a store."""

    shard_rows: Annotated[int, range(1, 1 << 31)]
    batch_tokens: Count
    context: Count
    stride: Count
    tokenizer: Mapping[str, Any]  # name, digest, bos_id, special_ids
    model: Mapping[str, Any]  # identity and facts of the model
    vocabulary: Digest  # kit piece: display text of every token id
    created: str
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the body of `store.json`."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any], name: str) -> Self:
        """Return what a `store.json` says.

        Raises UnsupportedFormat where it is of another kind, or of a version newer than this release reads;
        CorruptStore where it says what none can say.
        """
        values = dict(body)
        kind, version = values.pop("format", None), values.pop("version", None)
        if kind != FORMAT or version != VERSION:
            raise UnsupportedFormat(
                explain(
                    f"{name} is of format {kind!r}, version {version!r}",
                    accepted=f"format {FORMAT!r}, version {VERSION}",
                    next_step="install a newer actstore: pip install --upgrade actstore",
                )
            )
        with refusing(name):
            found: Self = read_as(cls, values, "store")
            read_fields(_TOKENIZER, found.tokenizer, "tokenizer")
            read_fields(_MODEL, found.model, "model")
            read_fields(_FACTS, found.model["facts"], "facts")
        return found


# What is read of them; more may be there.
_TOKENIZER = {"name": str, "digest": str, "bos_id": int | None, "special_ids": tuple[int, ...]}
_FACTS = {"n_layers": Count, "n_heads": Count, "d_model": Count, "vocabulary_size": Count}
_MODEL = {"identity": ModelIdentity, "facts": Mapping[str, Any]}


@dataclass(frozen=True)
class Layout:
    """`layout.json`: segments, passes, which pass owns each artifact, and the digest of every `zarr.json`."""

    segments: tuple[Segment, ...] = ()
    passes: tuple[PassId, ...] = ()
    artifacts: Mapping[Artifact, Owner] = field(default_factory=dict)  # artifact → pass that made it
    metadata: Mapping[MetadataPath, Digest] = field(default_factory=dict)  # path of a zarr.json → sha256
    sealed: Mapping[PassId, tuple[Count, ...]] = field(default_factory=dict)  # pass → segments that have manifests

    @property
    def n_shards(self) -> int:
        return sum(segment.n_shards for segment in self.segments)

    @property
    def n_docs(self) -> int:
        return sum(segment.n_docs for segment in self.segments)

    @property
    def n_seqs(self) -> int:
        return sum(segment.n_seqs for segment in self.segments)

    @property
    def n_rows(self) -> int:
        """Rows in use over all segments; filler left out."""
        return sum(segment.n_rows for segment in self.segments)

    def segment_of(self, shard: int) -> Segment:
        """Return the segment that a shard belongs to."""
        return next(one for one in self.segments if one.first_shard <= shard < one.first_shard + one.n_shards)

    def with_pass(self, pass_id: str, made: PassFile) -> Layout:
        """Return the layout after a pass was begun: it owns what it makes."""
        return replace(
            self, passes=(*self.passes, pass_id), artifacts={**self.artifacts, **dict.fromkeys(made.artifacts, pass_id)}
        )

    def kit_of(self, pass_id: str, made: PassFile) -> set[str]:
        """Return the digests of the kit pieces that a pass still needs: an SAE's weights go with its firings."""
        dropped = {f"sae/{one.sae}" for one in made.firings if self.artifacts.get(f"firings/{one.sae}") != pass_id}
        return {digest for name, digest in made.kit.items() if name not in dropped}

    def to_json(self) -> dict[str, Any]:
        """Return the body of `layout.json`."""
        return {
            **asdict(self),
            "segments": [asdict(segment) for segment in self.segments],
            "passes": list(self.passes),
            "sealed": {one: list(segments) for one, segments in self.sealed.items()},
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any], name: str = "layout.json") -> Self:
        """Return what a `layout.json` says; raises CorruptStore where it says what none can say."""
        with refusing(name):
            found: Self = read_as(cls, body, "layout")
            _refuse_gaps(found.segments)
            if strangers := set(found.artifacts.values()) - {CORPUS_PASS, *found.passes}:
                raise ValueError(f"an artifact is owned by {min(strangers)}, which is no pass of the store")
        return found


def _refuse_gaps(segments: tuple[Segment, ...]) -> None:
    """Raise ValueError where a segment does not begin where the one before ends."""
    begins = (0, 0, 0, 0)
    for one in segments:
        if (one.segment, one.first_doc, one.first_seq, one.first_shard) != begins:
            raise ValueError(f"segment {one.segment} does not begin at segment, document, sequence, shard {begins}")
        if min(sizes := (one.n_docs, one.n_seqs, one.n_shards, one.n_rows)) < 0:
            raise ValueError(f"segment {one.segment} has {sizes} documents, sequences, shards, rows")
        if one.first_shard + one.n_shards > MOST_SHARDS:
            raise ValueError(f"segment {one.segment} has {one.n_shards} shards, where at most {MOST_SHARDS} are read")
        begins = (one.segment + 1, begins[1] + one.n_docs, begins[2] + one.n_seqs, begins[3] + one.n_shards)


@dataclass(frozen=True)
class PassFile:
    """`passes/<pass>/pass.json`: the recipe and what the pass makes, written when it begins."""

    recipe: Mapping[str, Any]
    matrices: tuple[MatrixSpec, ...]
    firings: tuple[FiringsSpec, ...]
    kit: Mapping[PieceName, Digest] = field(default_factory=dict)  # name of a piece → its digest
    files: Mapping[StoredPath, FileProof] = field(default_factory=dict)  # made once, not per shard
    health: tuple[Mapping[str, Any], ...] = ()

    @property
    def artifacts(self) -> tuple[str, ...]:
        """What the pass makes, as it is listed and dropped."""
        paths = [spec.path for spec in self.matrices] + [f"firings/{spec.sae}" for spec in self.firings]
        return tuple(dict.fromkeys(artifact_of(path) for path in paths))

    @property
    def recipe_digest(self) -> str:
        """Identity of the pass."""
        return Recipe.from_json(self.recipe).digest

    def to_json(self) -> dict[str, Any]:
        """Return the body of `pass.json`."""
        body = asdict(self)
        body["matrices"] = [_matrix_json(spec) for spec in self.matrices]
        return {**body, "firings": [asdict(spec) for spec in self.firings], "health": list(self.health)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any], name: str = "pass.json") -> Self:
        """Return what a `pass.json` says; raises CorruptStore where it says what none can say."""
        with refusing(name):
            found: Self = read_as(cls, body, "pass")
            read_as(tuple[Artifact, ...], list(found.artifacts), "artifacts")
            read_as(Recipe, found.recipe, "recipe")
            for check in found.health:
                read_fields(_CHECK, check, "health")
        return found


_CHECK = {"name": str, "subject": str, "value": float | None, "expected": str, "ok": bool | None}
_LATER = {"n_heads": None, "compressed": True}  # fields added to format 1, with what was the case before


def _matrix_json(spec: MatrixSpec) -> dict[str, Any]:
    """Return a matrix as JSON values; `n_heads` and `compressed`, which came later, only where they say something."""
    body = {**asdict(spec), "columns": list(spec.columns)}
    return {key: value for key, value in body.items() if _LATER.get(key, ...) != value}
