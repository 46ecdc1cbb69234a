"""Making and growing a store: its creation, its segments, the beginning of a pass (docs/format.md §3, §4, §7)."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from actstore.blocks import Segment
from actstore.errors import CorruptStore, InvalidInput, MissingInput, explain
from actstore.sealed import read_sealed, sha256_hex, write_durably, write_sealed

from .arrays import array_metadata, encode_shard, group_metadata, lengthened
from .claims import CLAIMS_LOCK
from .dropping import forget_labels, freed_pieces, given_labels, without
from .files import (
    LAYOUT_FILE,
    STORE_FILE,
    is_row_keyed,
    make_directory,
    manifest_file,
    matrix_file,
    metadata_file,
    pass_file,
    prove_and_write,
    write_groups,
)
from .growing import GrowingArray
from .layout import CORPUS_PASS, FileProof, Layout, PassFile, StoreFile
from .location import Location
from .receipts import load_layout, lost
from .segments import SEGMENT_ARRAYS, TOKENS, CorpusPart, append_part
from .sharing import forget_unused

__all__ = ["StoreWriter"]


@dataclass
class StoreWriter:
    """A local store opened for writing; `layout` is what its `layout.json` says."""

    root: Path
    store: StoreFile
    layout: Layout

    @classmethod
    def open(cls, root: Path) -> StoreWriter:
        """Open an existing store for writing.

        Raises MissingInput where there is none, CorruptStore or UnsupportedFormat where it cannot be read.
        """
        if not (root / STORE_FILE).is_file():
            command = f"actstore extract MODEL DATASET --out {shlex.quote(str(root))} --site 'resid_post.*'"
            raise MissingInput(
                explain(
                    f"There is no store at {root}",
                    accepted="a local directory that `actstore extract … --out` made",
                    next_step=f"make one: {command}",
                )
            )
        store = StoreFile.from_json(read_sealed(root / STORE_FILE), str(root / STORE_FILE))
        return cls(root, store, load_layout(Location.of(root)))

    @classmethod
    def create(cls, root: Path, store: StoreFile) -> StoreWriter:
        """Make a store in a new or empty directory; call it with the lock held."""
        write_sealed(root / STORE_FILE, store.to_json())
        return cls(root, store, Layout())

    @staticmethod
    def prepare(root: Path) -> bool:
        """Make the directory; return whether a store is in it already.

        Raises InvalidInput where something else is there.
        """
        if root.exists() and not root.is_dir():
            raise InvalidInput(explain(f"{root} is a file", accepted="a directory that is new, empty or a store"))
        root.mkdir(parents=True, exist_ok=True)
        begun = {"lock", CLAIMS_LOCK, "kit"}
        others = [path.name for path in root.iterdir() if path.name not in begun and path.suffix != ".partial"]
        if (root / STORE_FILE).exists():  # asked last: another process may be making it meanwhile
            return True
        if others:
            raise InvalidInput(
                explain(
                    f"{root} exists and is not a store (it holds {', '.join(sorted(others)[:3])} …)",
                    accepted="a directory that is new, empty or a store",
                    next_step="choose another --out",
                )
            )
        return False

    def write_segment(self, parts: Iterable[CorpusPart], describe: Callable[[], Mapping[str, Any]]) -> Segment:
        """Write a new segment's documents, sequences and tokens and add it to the layout; call with the lock held.

        `describe` is asked after the last part for what the manifest says of the segment, `documents_digest` at least.
        """
        number, first = len(self.layout.segments), self.layout
        home = f"corpus/segments/{number}"
        shutil.rmtree(self.root / "arrays" / home, ignore_errors=True)  # of a run that died here
        files: dict[str, FileProof] = {}

        def write(array: str) -> Any:
            def write_shard(name: str, data: bytes, values: npt.NDArray[Any]) -> None:
                path = f"arrays/{home}/{array}/{name}"
                files[path] = prove_and_write(self.root, path, data, [values])

            return write_shard

        growing = {spec.name: GrowingArray(spec, write(spec.name)) for spec in SEGMENT_ARRAYS}
        rows_used: list[int] = []
        for part in parts:
            append_part(growing, part)
            for shard in part.shards:
                path = matrix_file(TOKENS.path, shard.shard)
                data = encode_shard(TOKENS, shard.values, self.store.shard_rows)
                files[path] = prove_and_write(self.root, path, data, [shard.values])
                rows_used.append(shard.n_rows)
        metadata = {f"{home}/{name}": array.close() for name, array in growing.items()}
        description = describe()
        segment = Segment(
            number,
            first.n_docs,
            len(growing["documents"]),
            first.n_seqs,
            len(growing["sequences"]),
            first.n_shards,
            len(rows_used),
            sum(rows_used),
            description["documents_digest"],
        )
        body = {
            "segment": asdict(segment),
            "rows_used": rows_used,
            "describe": dict(description),
            "files": {path: asdict(proof) for path, proof in files.items()},
        }
        make_directory((self.root / manifest_file(CORPUS_PASS, number)).parent)
        write_sealed(self.root / manifest_file(CORPUS_PASS, number), body)
        self._add_segment(segment, metadata)
        return segment

    def _add_segment(self, segment: Segment, metadata: Mapping[str, bytes]) -> None:
        if not self.layout.segments:
            metadata = {**metadata, TOKENS.path: array_metadata(TOKENS, 0, self.store.shard_rows)}
        digests = self._write_metadata(metadata)
        artifacts = {**self.layout.artifacts, TOKENS.path: CORPUS_PASS}
        segments = (*self.layout.segments, segment)
        self._publish(replace(self.layout, segments=segments, artifacts=artifacts), digests)

    def begin_pass(self, pass_id: str, made: PassFile) -> None:
        """Declare a pass: its file, the metadata of its arrays, its place in the layout; call with the lock held."""
        # What a drop that died has left of the same recipe's pass would be taken for receipts of this one.
        shutil.rmtree(self.root / "passes" / pass_id, ignore_errors=True)
        if made.firings:  # and its labels for those of other SAEs that have the ids now
            forget_labels(self.root, given_labels(self.root), [spec.sae for spec in made.firings])
        make_directory((self.root / pass_file(pass_id)).parent)
        write_sealed(self.root / pass_file(pass_id), made.to_json())
        arrays = {spec.path: array_metadata(spec, 0, self.store.shard_rows) for spec in made.matrices}
        digests = self._write_metadata(arrays)
        self._publish(self.layout.with_pass(pass_id, made), digests)

    def add_to_kit(self, pass_id: str, pieces: Mapping[str, str]) -> None:
        """Name further kit pieces (name → digest) in a pass that was begun without them; call with the lock held."""
        made = PassFile.from_json(read_sealed(self.root / pass_file(pass_id)), pass_file(pass_id))
        write_sealed(self.root / pass_file(pass_id), replace(made, kit={**made.kit, **pieces}).to_json())

    def drop(self, artifact: str) -> int:
        """Take an artifact out of the layout, then remove its files, and the labels and kit pieces that only it had.

        Return how many labels. Call it with the lock held and nobody at work (`no_claims`). Raises CorruptStore where
        the labels or an array's metadata are damaged: nothing is removed then.
        """
        layout, homes = without(self.layout, artifact)
        pieces = freed_pieces(self.root, self.store.vocabulary, self.layout, layout)
        kind, _, sae = artifact.partition("/")
        labels = given_labels(self.root) if kind == "firings" else {}
        self._publish(layout, {})
        for home in filter(Path.is_dir, map(self.root.joinpath, homes)):
            shutil.rmtree(home)
        for piece in pieces:
            (self.root / piece).unlink(missing_ok=True)
        forget_unused()
        return forget_labels(self.root, labels, [sae])

    def mark_sealed(self, pass_id: str, segments: Iterable[int]) -> None:
        """Record that these segments of a pass have manifests, so that a lost one is missed; needs the lock."""
        known = set(self.layout.sealed.get(pass_id, ()))
        if not known >= set(segments):
            sealed = {**self.layout.sealed, pass_id: tuple(sorted(known | set(segments)))}
            self.layout = replace(self.layout, sealed=sealed)
            write_sealed(self.root / LAYOUT_FILE, self.layout.to_json())

    def repair_metadata(self) -> None:
        """Bring every array to the length that the layout says: a run may have died while it added a segment.

        Call it with the lock held; raises CorruptStore where an array's metadata is damaged, or where a manifest is
        lost: a pass must not make again what it has.
        """
        sealed = ((one, segment) for one in self.layout.passes for segment in self.layout.sealed.get(one, ()))
        for manifest in (manifest_file(*one) for one in sealed):
            if not (self.root / manifest).exists():
                raise lost(manifest)
        for path, digest in self.layout.metadata.items():
            if is_row_keyed(path):
                self._rewrite(path, self._metadata(path, digest))

    def _metadata(self, path: str, digest: str) -> bytes:
        """Return a `zarr.json` as the layout has it; what was changed must not be taken for what was written."""
        try:
            data = (self.root / path).read_bytes()
            if sha256_hex(data) != digest:
                data = lengthened(data, self._n_rows)
        except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
            data = b""
        if sha256_hex(data) != digest:
            raise CorruptStore(
                explain(
                    f"{self.root / path} is missing or not what was written",
                    next_step="run `actstore verify` to see everything that is damaged",
                )
            )
        return data

    @property
    def _n_rows(self) -> int:
        """Length of every row-keyed array, filler included."""
        return self.layout.n_shards * self.store.shard_rows

    def _rewrite(self, path: str, data: bytes) -> None:
        if (self.root / path).read_bytes() != data:
            write_durably(self.root / path, data)

    def _write_metadata(self, arrays: Mapping[str, bytes]) -> dict[str, str]:
        for path, data in arrays.items():
            file = self.root / metadata_file(path)
            make_directory(file.parent)
            write_durably(file, data)
        groups = write_groups(self.root, arrays, group_metadata())
        return groups | {metadata_file(path): sha256_hex(data) for path, data in arrays.items()}

    def _publish(self, layout: Layout, digests: Mapping[str, str]) -> None:
        """Make every row-keyed array as long as the layout, then replace the layout.

        In this order whoever reads in between, or after a run died there, finds arrays that are longer than its layout:
        what is past the layout's end is never asked for.
        """
        metadata = {**layout.metadata, **digests}
        for path in filter(is_row_keyed, metadata):
            data = lengthened(self._metadata(path, metadata[path]), layout.n_shards * self.store.shard_rows)
            self._rewrite(path, data)
            metadata[path] = sha256_hex(data)
        self.layout = replace(layout, metadata=metadata)
        write_sealed(self.root / LAYOUT_FILE, self.layout.to_json())
