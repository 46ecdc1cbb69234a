"""Prove every byte of a store, and name all faults at once (docs/format.md §9)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from actstore.blocks import Segment, artifact_of
from actstore.errors import ActstoreError
from actstore.sealed import PARTIAL_SUFFIX, sha256_hex, unseal

from .arrays import lengthened
from .claims import CLAIMS_LOCK
from .csr import decode_firings
from .feature_files import LABELS_FILE, labels_of
from .files import (
    ARRAYS,
    LAYOUT_FILE,
    STORE_FILE,
    is_row_keyed,
    manifest_file,
    metadata_file,
    pass_file,
    receipt_file,
    values_digest,
)
from .kit import kit_file
from .layout import CORPUS_PASS, FileProof, Layout, PassFile, StoreFile
from .location import Location
from .receipts import RECEIPT_NAME, Receipt, corpus_manifest, pass_manifest, proofs_of, receipt_of
from .shapes import read_as

__all__ = ["Verification", "verify_store"]

OURS = (ARRAYS, "firings", "kit", "passes", "journal")  # claims come and go, the index proves itself, notes are theirs
LOCKS = {"lock", "index.lock", CLAIMS_LOCK}  # empty
# What zarr raises where a sealed `zarr.json` says what no array is.
UNDECODABLE = (ActstoreError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError)
MOST_ROWS = 1 << 31  # of a shard, where store.json cannot say
Progress = Callable[[int, int], None]


@dataclass
class Verification:
    """What a verification found: faults are damage, orphans are files that nothing names."""

    n_files: int = 0
    n_bytes: int = 0
    faults: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults


def verify_store(root: Path, progress: Progress | None = None) -> Verification:
    """Prove every file of a local store except its index; never stops at the first fault."""
    return _Verifier(root, progress).run()


class _Verifier:
    def __init__(self, root: Path, progress: Progress | None) -> None:
        self.root, self.location, self.progress = root, Location.of(root), progress
        self.found = Verification()
        self.seen: set[str] = set()
        self.shard_rows = MOST_ROWS
        self.unproved: set[str] = set()  # metadata of arrays that is damaged
        self._array = cache(self.location.zarr_array)
        self.kit: set[str] = set()  # digests of the pieces that must be there

    def run(self) -> Verification:
        store: StoreFile | None = self._sealed(STORE_FILE, lambda body: StoreFile.from_json(body, STORE_FILE))
        layout = self._layout()
        if store:
            self.shard_rows = store.shard_rows
            self.kit.add(store.vocabulary)
            self._metadata(layout, store.shard_rows)
        expected = dict(self._expected(layout))
        for number, (path, proof) in enumerate(sorted(expected.items())):
            self._file(path, proof)
            if self.progress:
                self.progress(number + 1, len(expected))
        self._content_addressed()
        self._journal()
        if (self.root / LABELS_FILE).exists():
            self._sealed(LABELS_FILE, lambda body: labels_of(body, LABELS_FILE))
        self.seen |= LOCKS
        self._find_orphans()
        return self.found

    def _layout(self) -> Layout:
        if not (self.root / LAYOUT_FILE).exists() and not any(self.root.glob(pass_file("*"))):
            return Layout()  # tokenising has not ended
        return self._sealed(LAYOUT_FILE, Layout.from_json) or Layout()

    def _metadata(self, layout: Layout, shard_rows: int) -> None:
        """Prove every `zarr.json`; arrays may be longer than the layout where a run died as it added a segment."""
        unfinished = self._unfinished_segment(layout)
        for path, digest in sorted(layout.metadata.items()):
            if unfinished and is_row_keyed(path) and self._is_longer(path, digest, layout, shard_rows, unfinished):
                self.seen.add(path)
                self.found.orphans.append(f"{path}: made longer for documents that were not added in the end")
            else:
                self.unproved |= set() if self._bytes(path, FileProof(-1, digest)) else {path}

    def _unfinished_segment(self, layout: Layout) -> int:
        """Return the number of shards of a segment that has its manifest and no place in the layout; 0 for none."""
        try:
            data = (self.root / manifest_file(CORPUS_PASS, len(layout.segments))).read_bytes()
            segment: Segment = read_as(Segment, unseal(data, "").get("segment"), "segment")
            return segment.n_shards
        except (OSError, ActstoreError, TypeError, ValueError):
            return 0

    def _is_longer(self, path: str, digest: str, layout: Layout, shard_rows: int, n_shards: int) -> bool:
        try:
            data = (self.root / path).read_bytes()
            proved = sha256_hex(lengthened(data, layout.n_shards * shard_rows)) == digest
            return proved and data == lengthened(data, (layout.n_shards + n_shards) * shard_rows)
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return False

    def _expected(self, layout: Layout) -> Iterator[tuple[str, FileProof]]:
        """Yield every proved file: its path and its proof."""
        for segment in layout.segments:
            yield from self._of_corpus(segment).items()
        for pass_id in layout.passes:
            made = self._sealed(pass_file(pass_id), PassFile.from_json)
            self.kit |= layout.kit_of(pass_id, made) if made else set()
            files = list(made.files.items()) if made else []
            for receipt in self._receipts(pass_id, layout):
                files += proofs_of(receipt, "").items()
            for path, proof in files:
                artifact = artifact_of(path.removeprefix(f"{ARRAYS}/"))
                if layout.artifacts.get(artifact) == pass_id:  # else it was dropped
                    yield path, proof

    def _of_corpus(self, segment: Segment) -> dict[str, FileProof]:
        name = manifest_file(CORPUS_PASS, segment.segment)
        manifest = self._sealed(name, lambda body: corpus_manifest(body, name, segment, self.shard_rows))
        return proofs_of(manifest, name) if manifest else {}

    def _receipts(self, pass_id: str, layout: Layout) -> list[Receipt]:
        # Loose receipts first: one that is sealed and removed meanwhile is then found in the manifest.
        home = f"passes/{pass_id}/receipts"
        shards = [int(match[1]) for match in map(RECEIPT_NAME.fullmatch, self.location.names(home)) if match]
        receipts = [self._loose(pass_id, layout, shard) for shard in shards]
        for segment in layout.segments:
            name = manifest_file(pass_id, segment.segment)
            if (self.root / name).exists() or segment.segment in layout.sealed.get(pass_id, ()):
                parse = partial(pass_manifest, name=name, pass_id=pass_id, segment=segment)
                receipts += (self._sealed(name, parse) or {}).values()
        return [receipt for receipt in receipts if receipt]

    def _loose(self, pass_id: str, layout: Layout, shard: int) -> Receipt | None:
        """Return a shard's own receipt; None after noting its fault, or where it was sealed since it was listed."""
        name, segments = receipt_file(pass_id, shard), layout.segments
        segment = next((one.segment for one in segments if shard < one.first_shard + one.n_shards), len(segments))
        parse = partial(receipt_of, name=name, pass_id=pass_id, shard=shard)
        found: Receipt | None = self._sealed(name, parse, sealed_in=manifest_file(pass_id, segment))
        return found

    def _sealed(self, name: str, parse: Callable[[dict[str, Any]], Any], sealed_in: str | None = None) -> Any:
        """Return a sealed file, parsed, or None after noting its fault; where it is sealed in another there is none."""
        data = self._read(name, sealed_in)
        if data is None:
            return None
        try:
            return parse(unseal(data, name))
        except ActstoreError as error:
            self.found.faults.append(f"{name} is not what was written ({error})")
            return None

    def _read(self, name: str, sealed_in: str | None = None) -> bytes | None:
        self.seen.add(name)
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            if isinstance(error, FileNotFoundError) and sealed_in and (self.root / sealed_in).exists():
                return None
            self.found.faults.append(f"{name} cannot be read: {error.strerror}")
            return None
        self.found.n_files += 1
        self.found.n_bytes += len(data)
        return data

    def _bytes(self, name: str, proof: FileProof) -> bytes | None:
        """Return a file whose bytes are proved, or None after noting its fault."""
        data = self._read(name)
        if data is None:
            return None
        if proof.bytes >= 0 and len(data) != proof.bytes:
            self.found.faults.append(f"{name} has {len(data)} bytes where {proof.bytes} were written")
            return None
        if sha256_hex(data) != proof.sha256:
            self.found.faults.append(f"{name} is not what was written (its SHA-256 differs)")
            return None
        return data

    def _file(self, name: str, proof: FileProof) -> None:
        data = self._bytes(name, proof)
        if data is None or proof.values_sha256 is None:
            return
        if metadata_file(name.removeprefix(f"{ARRAYS}/").rpartition("/")[0]) in self.unproved:
            return  # its bytes are proved; how to decode them is what was damaged
        try:
            values = _firings(data, name) if name.startswith("firings/") else [self._matrix(name)]
        except UNDECODABLE as error:
            self.found.faults.append(f"{name} cannot be decoded: {error}")
            return
        if values_digest(values) != proof.values_sha256:
            self.found.faults.append(f"{name} decodes to other values than were written: another codec version?")

    def _matrix(self, name: str) -> Any:
        """Return what one shard's file decodes to, filler included, cut at the array's end."""
        path, _, file = name.removeprefix(f"{ARRAYS}/").rpartition("/")
        array = self._array(f"{ARRAYS}/{path}")
        if array.shards is None:
            raise ValueError("its array has no shards")
        first = int(file.split(".")[1]) * array.shards[0]
        return array[first : first + array.shards[0]]

    def _content_addressed(self) -> None:
        present = {
            name.removesuffix(".zip") for name in self.location.names("kit") if not name.endswith(PARTIAL_SUFFIX)
        }
        for digest in sorted(present | self.kit):
            self._piece(kit_file(digest), digest)
        self.seen -= {kit_file(digest) for digest in present - self.kit}

    def _piece(self, name: str, digest: str) -> None:
        """Prove a kit piece by its name; it may be larger than the memory."""
        self.seen.add(name)
        try:
            with (self.root / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                self.found.n_bytes += file.tell()
        except OSError as error:
            self.found.faults.append(f"{name} cannot be read: {error.strerror}")
            return
        self.found.n_files += 1
        if found != digest:
            self.found.faults.append(f"{name} is not what was written (its SHA-256 differs)")

    def _journal(self) -> None:
        for name in self.location.names("journal"):
            data = self._read(f"journal/{name}") or b""
            *lines, torn = data.split(b"\n")
            for number, line in enumerate(lines):
                try:
                    unseal(line + b"\n", name)
                except ActstoreError:
                    self.found.faults.append(f"journal/{name}, line {number + 1} is not what was written")
            if torn and _is_line_without_end(torn):
                self.found.faults.append(f"journal/{name}, line {len(lines) + 1} is not what was written")
            elif torn:
                self.found.orphans.append(f"journal/{name}: a last line that was not finished")

    def _find_orphans(self) -> None:
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            ours = name.split("/")[0] in OURS or name.endswith(PARTIAL_SUFFIX)
            if ours and path.is_file() and name not in self.seen:
                self.found.orphans.append(name)


def _firings(data: bytes, name: str) -> list[Any]:
    """Return the arrays of a shard's firings as they are stored: pass.json, which says their width, may be damaged."""
    firings = decode_firings(data, name)
    return [firings.indptr, firings.features, firings.activations]


def _is_line_without_end(line: bytes) -> bool:
    """Return whether a journal's last line is whole but for its newline; a torn one is what a dead run leaves."""
    try:
        unseal(line[:-1] + b"\n", "")
    except ActstoreError:
        return False
    return True
