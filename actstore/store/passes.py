"""Writing a pass: claim a shard, write its files, then its receipt; seal what is complete (docs/format.md §7)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actstore.blocks import Segment, ShardBlock, artifact_of
from actstore.errors import CorruptStore, explain
from actstore.sealed import fsync_directory, read_sealed, write_sealed

from .arrays import encode_shard
from .claims import CLAIMS, Claim, claim
from .csr import encode_firings, firings_values
from .files import (
    firings_file,
    make_directory,
    manifest_file,
    matrix_file,
    pass_file,
    prove_and_write,
    receipt_file,
)
from .layout import FileProof, PassFile
from .writer import StoreWriter

__all__ = ["PassWriter"]


class PassWriter:
    """One pass of a store, being written by this process and perhaps by others."""

    def __init__(self, writer: StoreWriter, pass_id: str) -> None:
        self.writer, self.pass_id = writer, pass_id
        self.root: Path = writer.root
        self.made = PassFile.from_json(read_sealed(self.root / pass_file(pass_id)))

    def pending(self) -> list[int]:
        """Return the shards that have no receipt yet, in order."""
        return [
            shard
            for segment in self.writer.layout.segments
            if not (self.root / manifest_file(self.pass_id, segment.segment)).exists()
            for shard in _shards(segment)
            if not self.has_receipt(shard)
        ]

    def has_receipt(self, shard: int) -> bool:
        """Return whether a shard is durable."""
        segment = self.writer.layout.segment_of(shard)
        manifest = self.root / manifest_file(self.pass_id, segment.segment)
        # The receipt first: sealing writes the manifest before it removes receipts.
        return (self.root / receipt_file(self.pass_id, shard)).exists() or manifest.exists()

    def claim(self, shard: int) -> Claim | None:
        """Return the right to write a shard, or None while another living process has it."""
        return claim(self.root / CLAIMS / self.pass_id / f"{shard}.json", self.root)

    def commit(self, block: ShardBlock) -> None:
        """Write everything of one shard durably, then its receipt; call it with the claim held.

        Raises NoSpace where the disk is full; the shard then has no receipt and is made again later.
        """
        files = self._write_matrices(block) | self._write_firings(block)
        receipt = {
            "pass": self.pass_id,
            "shard": block.shard,
            "n_rows": block.n_rows,
            "files": {path: asdict(proof) for path, proof in files.items()},
            "provenance": dict(block.provenance),
        }
        path = self.root / receipt_file(self.pass_id, block.shard)
        make_directory(path.parent)
        write_sealed(path, receipt)

    def _owns(self, path: str) -> bool:
        """Return whether the pass still makes this: what was dropped may belong to another pass by now."""
        return self.writer.layout.artifacts.get(artifact_of(path)) == self.pass_id

    def _write_matrices(self, block: ShardBlock) -> dict[str, FileProof]:
        files = {}
        shard_rows = self.writer.store.shard_rows
        for spec in filter(lambda one: self._owns(one.path), self.made.matrices):
            values = block.matrices[spec.path]
            assert values.shape == (shard_rows, *spec.row_shape), (spec.path, values.shape)
            name = matrix_file(spec.path, block.shard, len(spec.axes))
            files[name] = prove_and_write(self.root, name, encode_shard(spec, values, shard_rows), [values])
        return files

    def _write_firings(self, block: ShardBlock) -> dict[str, FileProof]:
        files = {}
        for spec in filter(lambda one: self._owns(f"firings/{one.sae}"), self.made.firings):
            firings = block.firings[spec.sae]
            name = firings_file(spec.sae, block.shard)
            values = firings_values(firings, spec.n_features)
            files[name] = prove_and_write(self.root, name, encode_firings(spec, firings), values)
        return files

    def seal(self) -> bool:
        """Seal every segment whose shards all have receipts; return whether the whole pass is complete."""
        with self.writer.locked():
            # Others may have added a segment or a pass since this process read the layout.
            current = StoreWriter.open(self.root)
            sealed = [segment for segment in current.layout.segments if self._seal(segment)]
            current.mark_sealed(self.pass_id, [segment.segment for segment in sealed])
            for segment in sealed:
                self._remove_receipts(segment)
        if complete := len(sealed) == len(current.layout.segments):
            self._remove_claims()
        return complete

    def _seal(self, segment: Segment) -> bool:
        manifest = self.root / manifest_file(self.pass_id, segment.segment)
        if manifest.exists():
            return True
        if any(not (self.root / receipt_file(self.pass_id, shard)).exists() for shard in _shards(segment)):
            return False
        receipts = {str(shard): self._receipt(shard) for shard in _shards(segment)}
        write_sealed(manifest, {"pass": self.pass_id, "segment": segment.segment, "receipts": receipts})
        return True

    def _remove_receipts(self, segment: Segment) -> None:
        for shard in _shards(segment):
            (self.root / receipt_file(self.pass_id, shard)).unlink(missing_ok=True)
        fsync_directory(self.root / "passes" / self.pass_id)

    def _remove_claims(self) -> None:
        """Remove the pass's directory of claims, unless somebody has claimed a shard of a newer segment."""
        home = self.root / CLAIMS / self.pass_id
        if not any(home.glob("*.json")):
            with suppress(OSError):
                (home / "takeover").unlink(missing_ok=True)
                home.rmdir()

    def _receipt(self, shard: int) -> Mapping[str, Any]:
        receipt = read_sealed(self.root / receipt_file(self.pass_id, shard))
        if (receipt["pass"], receipt["shard"]) != (self.pass_id, shard):
            raise CorruptStore(
                explain(
                    f"The receipt of shard {shard} is that of shard {receipt['shard']} of pass {receipt['pass']}",
                    next_step="remove it and run the same extraction again; the shard is then made anew",
                )
            )
        return receipt


def _shards(segment: Segment) -> range:
    return range(segment.first_shard, segment.first_shard + segment.n_shards)
