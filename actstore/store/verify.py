"""Prove every byte of a store, and name all faults at once (docs/format.md §9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actstore.blocks import RowFirings, artifact_of
from actstore.errors import ActstoreError
from actstore.sealed import PARTIAL_SUFFIX, sha256_hex, unseal

from .csr import decode_firings, firings_values
from .files import ARRAYS, LAYOUT_FILE, STORE_FILE, manifest_file, pass_file, values_digest
from .layout import CORPUS_PASS, FileProof, Layout, PassFile, StoreFile
from .location import Location

__all__ = ["Verification", "verify_store"]

OUTSIDE = ("claims", "index")  # claims come and go; the index proves itself
LOCKS = {"lock", "index.lock"}  # empty
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

    def run(self) -> Verification:
        self._sealed(STORE_FILE, lambda body: StoreFile.from_json(body, STORE_FILE))
        layout = self._sealed(LAYOUT_FILE, Layout.from_json) or Layout()
        for path, digest in sorted(layout.metadata.items()):
            self._bytes(path, FileProof(-1, digest))
        expected = dict(self._expected(layout))
        for number, (path, (proof, n_features)) in enumerate(sorted(expected.items())):
            self._file(path, proof, n_features)
            if self.progress:
                self.progress(number + 1, len(expected))
        self._content_addressed()
        self._journal()
        if (self.root / "labels.json").exists():
            self._sealed("labels.json", dict)
        self.seen |= LOCKS
        self._find_orphans()
        return self.found

    def _expected(self, layout: Layout) -> Iterator[tuple[str, tuple[FileProof, int]]]:
        """Yield every proved file: its path, its proof and number of features (0: it holds no firings)."""
        for segment in layout.segments:
            manifest = self._sealed(manifest_file(CORPUS_PASS, segment.segment), dict) or {"files": {}}
            yield from ((path, (FileProof(**proof), 0)) for path, proof in manifest["files"].items())
        for pass_id in layout.passes:
            made = self._sealed(pass_file(pass_id), PassFile.from_json)
            widths = {f"firings/{spec.sae}": spec.n_features for spec in made.firings} if made else {}
            files = [(path, proof) for path, proof in made.files.items()] if made else []
            for receipt in self._receipts(pass_id, layout):
                files += [(path, FileProof(**proof)) for path, proof in receipt["files"].items()]
            for path, proof in files:
                artifact = artifact_of(path.removeprefix(f"{ARRAYS}/"))
                if layout.artifacts.get(artifact) == pass_id:  # else it was dropped
                    is_firings = path.startswith("firings/") and proof.values_sha256 is not None
                    yield path, (proof, widths[artifact] if is_firings else 0)

    def _receipts(self, pass_id: str, layout: Layout) -> list[dict[str, Any]]:
        receipts: list[dict[str, Any]] = []
        for segment in layout.segments:
            name = manifest_file(pass_id, segment.segment)
            if (self.root / name).exists():
                receipts += (self._sealed(name, dict) or {"receipts": {}})["receipts"].values()
        home = f"passes/{pass_id}/receipts"
        for name in self.location.names(home):
            if not name.endswith(PARTIAL_SUFFIX) and (receipt := self._sealed(f"{home}/{name}", dict)):
                if f"{receipt['shard']}.json" != name or receipt["pass"] != pass_id:
                    self.found.faults.append(f"{home}/{name} is the receipt of another shard or pass")
                receipts.append(receipt)
        return receipts

    def _sealed(self, name: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
        """Return a sealed file, parsed, or None after noting its fault."""
        data = self._read(name)
        if data is None:
            return None
        try:
            return parse(unseal(data, name))
        except (ActstoreError, TypeError, KeyError) as error:
            self.found.faults.append(f"{name} is not what was written ({error})")
            return None

    def _read(self, name: str) -> bytes | None:
        self.seen.add(name)
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
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

    def _file(self, name: str, proof: FileProof, n_features: int) -> None:
        data = self._bytes(name, proof)
        if data is None or proof.values_sha256 is None:
            return
        try:
            values = self._firings(data, name, n_features) if n_features else [self._matrix(name)]
        except (ActstoreError, ValueError, RuntimeError, KeyError) as error:
            self.found.faults.append(f"{name} cannot be decoded: {error}")
            return
        if values_digest(values) != proof.values_sha256:
            self.found.faults.append(f"{name} decodes to other values than were written: another codec version?")

    def _firings(self, data: bytes, name: str, n_features: int) -> list[Any]:
        firings: RowFirings = decode_firings(data, name)
        return firings_values(firings, n_features)

    def _matrix(self, name: str) -> Any:
        """Return what one shard's file decodes to, filler included, cut at the array's end."""
        path, _, file = name.removeprefix(f"{ARRAYS}/").rpartition("/")
        array = self.location.zarr_group(ARRAYS)[path]
        length = array.shards[0]  # type: ignore[union-attr, index]
        first = int(file.split(".")[1]) * length
        return array[first : first + length]  # type: ignore[index]

    def _content_addressed(self) -> None:
        for name in self.location.names("kit"):
            if not name.endswith(PARTIAL_SUFFIX):
                self._bytes(f"kit/{name}", FileProof(-1, name.removesuffix(".zip")))

    def _journal(self) -> None:
        for name in self.location.names("journal"):
            data = self._read(f"journal/{name}") or b""
            *lines, torn = data.split(b"\n")
            for number, line in enumerate(lines):
                try:
                    unseal(line + b"\n", name)
                except ActstoreError:
                    self.found.faults.append(f"journal/{name}, line {number + 1} is not what was written")
            if torn:
                self.found.orphans.append(f"journal/{name}: a last line that was not finished")

    def _find_orphans(self) -> None:
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if path.is_file() and name not in self.seen and name.split("/")[0] not in OUTSIDE:
                self.found.orphans.append(name)
