"""What a store holds: `store.json`, written once, and `layout.json`, replaced when it grows (docs/format.md §3, §4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from actstore.blocks import FiringsSpec, MatrixSpec, Segment, artifact_of
from actstore.errors import UnsupportedFormat, explain
from actstore.recipe import Recipe

__all__ = ["CORPUS_PASS", "FORMAT", "VERSION", "FileProof", "Layout", "PassFile", "StoreFile"]

FORMAT, VERSION = "actstore", 1
CORPUS_PASS = "corpus"  # tokenising is a pass too: its manifest proves the rows


@dataclass(frozen=True)
class FileProof:
    """A file as it was written: its size, the SHA-256 of its bytes and of the values that they decode to.

    Of a shard that is not compressed also the SHA-256 of its chunks' checksums.
    """

    bytes: int
    sha256: str
    values_sha256: str | None = None
    chunks_sha256: str | None = None


@dataclass(frozen=True)
class StoreFile:
    """`store.json`: what never changes in a store."""

    shard_rows: int
    batch_tokens: int
    context: int
    stride: int
    tokenizer: Mapping[str, Any]  # name, digest, bos_id, special_ids
    model: Mapping[str, Any]  # identity and facts of the model
    vocabulary: str  # kit piece: display text of every token id
    created: str
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the body of `store.json`."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any], name: str) -> Self:
        """Return what a `store.json` says.

        Raises UnsupportedFormat where it is of another kind, or of a version newer than this release reads.
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
        return cls(**values)


@dataclass(frozen=True)
class Layout:
    """`layout.json`: segments, passes, which pass owns each artifact, and the digest of every `zarr.json`."""

    segments: tuple[Segment, ...] = ()
    passes: tuple[str, ...] = ()
    artifacts: Mapping[str, str] = field(default_factory=dict)  # artifact → pass that made it
    metadata: Mapping[str, str] = field(default_factory=dict)  # path of a zarr.json → sha256
    sealed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # pass → segments that have manifests

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
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Return what a `layout.json` says."""
        return cls(
            segments=tuple(Segment(**segment) for segment in body["segments"]),
            passes=tuple(body["passes"]),
            artifacts=body["artifacts"],
            metadata=body["metadata"],
            sealed={one: tuple(segments) for one, segments in body["sealed"].items()},
        )


@dataclass(frozen=True)
class PassFile:
    """`passes/<pass>/pass.json`: the recipe and what the pass makes, written when it begins."""

    recipe: Mapping[str, Any]
    matrices: tuple[MatrixSpec, ...]
    firings: tuple[FiringsSpec, ...]
    kit: Mapping[str, str] = field(default_factory=dict)  # name of a piece → its digest
    files: Mapping[str, FileProof] = field(default_factory=dict)  # made once, not per shard
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
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Return what a `pass.json` says."""
        return cls(
            recipe=body["recipe"],
            matrices=tuple(MatrixSpec(**{**spec, "columns": tuple(spec["columns"])}) for spec in body["matrices"]),
            firings=tuple(FiringsSpec(**spec) for spec in body["firings"]),
            kit=body["kit"],
            files={path: FileProof(**proof) for path, proof in body["files"].items()},
            health=tuple(body["health"]),
        )


_LATER = {"n_heads": None, "compressed": True}  # fields added to format 1, with what was the case before


def _matrix_json(spec: MatrixSpec) -> dict[str, Any]:
    """Return a matrix as JSON values; `n_heads` and `compressed`, which came later, only where they say something."""
    body = {**asdict(spec), "columns": list(spec.columns)}
    return {key: value for key, value in body.items() if _LATER.get(key, ...) != value}
