"""Writing a pass: claim a shard, write its files, then its receipt; seal what is complete (docs/format.md §7)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy.typing as npt

from actstore.blocks import FiringsSpec, MatrixSpec, RowFirings, Segment, ShardBlock, artifact_of
from actstore.errors import CorruptStore, explain
from actstore.sealed import fsync_directory, read_sealed, write_sealed

from .arrays import encode_shard
from .claims import CLAIMS, LOCK_SECONDS, Claim, claim, exclusive
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

WRITERS = max(1, min(8, (os.cpu_count() or 1) // 2))  # files at once: the other cores belong to what makes the numbers


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

    def commit(self, block: ShardBlock) -> int:
        """Write everything of one shard durably, then its receipt; call it with the claim held. Return bytes written.

        Raises NoSpace where the disk is full; the shard then has no receipt and is made again later.
        """
        files = self._write(chain(self._matrix_jobs(block), self._firings_jobs(block)))
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
        return sum(proof.bytes for proof in files.values())

    def _owns(self, path: str) -> bool:
        """Return whether the pass still makes this: what was dropped may belong to another pass by now."""
        return self.writer.layout.artifacts.get(artifact_of(path)) == self.pass_id

    def _write(self, jobs: Iterable[Callable[[], tuple[str, FileProof]]]) -> dict[str, FileProof]:
        """Write a shard's files, several at once where there are cores for it; raises what kept one from it."""
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="write") as pool:
            running = [pool.submit(job) for job in jobs]
            try:
                return dict(one.result() for one in running)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _matrix_jobs(self, block: ShardBlock) -> Iterator[Callable[[], tuple[str, FileProof]]]:
        for spec in filter(lambda one: self._owns(one.path), self.made.matrices):
            yield partial(self._write_matrix, spec, block.shard, block.matrices[spec.path])

    def _write_matrix(self, spec: MatrixSpec, shard: int, values: npt.NDArray[Any]) -> tuple[str, FileProof]:
        shard_rows = self.writer.store.shard_rows
        assert values.shape == (shard_rows, *spec.row_shape), (spec.path, values.shape)
        name = matrix_file(spec.path, shard, len(spec.axes))
        return name, prove_and_write(self.root, name, encode_shard(spec, values, shard_rows), [values])

    def _firings_jobs(self, block: ShardBlock) -> Iterator[Callable[[], tuple[str, FileProof]]]:
        for spec in filter(lambda one: self._owns(f"firings/{one.sae}"), self.made.firings):
            yield partial(self._write_firings, spec, block.shard, block.firings[spec.sae])

    def _write_firings(self, spec: FiringsSpec, shard: int, firings: RowFirings) -> tuple[str, FileProof]:
        name, values = firings_file(spec.sae, shard), firings_values(firings, spec.n_features)
        return name, prove_and_write(self.root, name, encode_firings(spec, firings), values)

    def seal(self) -> bool:
        """Seal every segment whose shards all have receipts; return whether the whole pass is complete."""
        with exclusive(self.root, wait_seconds=LOCK_SECONDS):
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
