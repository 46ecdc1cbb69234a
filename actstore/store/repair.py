"""Giving up the shards that are damaged, so that the command which made them makes them again (docs/format.md §9)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actstore.blocks import Segment, artifact_of
from actstore.errors import CorruptStore
from actstore.sealed import read_sealed, sha256_of_file, write_sealed

from .files import ARRAYS, LAYOUT_FILE, make_directory, manifest_file, receipt_file
from .location import Location
from .receipts import RECEIPT_NAME, load_receipts
from .writer import StoreWriter

__all__ = ["GivenUp", "give_up_damaged"]

Progress = Callable[[int, int], None]
Receipts = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class GivenUp:
    """Shards of a pass that have no receipt any more, each with the files of it that were damaged."""

    pass_id: str
    shards: Mapping[int, tuple[str, ...]]


def give_up_damaged(root: Path, progress: Progress | None = None) -> list[GivenUp]:
    """Take back the receipts of shards with a file that is missing or is not what was written, and remove their files.

    So do shards whose receipt itself is damaged. All these count as not made then; the same pass makes them again, byte
    for byte. What no pass makes shard by shard (the corpus, metadata, kit) is left as it is. The caller holds the
    store's lock, and nobody extracts. Raises CorruptStore where the layout or a manifest cannot be read.
    """
    writer = StoreWriter.open(root)
    lost = {one: dict(_without_receipt(root, one)) for one in writer.layout.passes}
    receipts = {one: load_receipts(Location.of(root), writer.layout, one) for one in writer.layout.passes}
    n_all, n_proved = sum(map(len, receipts.values())), 0
    found: list[GivenUp] = []
    for pass_id, of_pass in receipts.items():
        damaged = lost[pass_id]
        for shard, receipt in of_pass.items():
            if files := tuple(_damaged(writer, pass_id, receipt)):
                damaged[shard] = files
            n_proved += 1
            if progress:
                progress(n_proved, n_all)
        if damaged:
            _give_up(writer, pass_id, of_pass, damaged)
            found.append(GivenUp(pass_id, damaged))
    return found


def _without_receipt(root: Path, pass_id: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Remove the loose receipts that cannot be read; yield their shards, and them."""
    for path in sorted((root / receipt_file(pass_id, 0)).parent.glob("*.json")):
        if RECEIPT_NAME.fullmatch(path.name):
            try:
                read_sealed(path)
            except CorruptStore:
                path.unlink()
                yield int(path.stem), (path.relative_to(root).as_posix(),)


def _damaged(writer: StoreWriter, pass_id: str, receipt: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files of a shard that are not what its receipt says."""
    for path, proof in _owned(writer, pass_id, receipt):
        file = writer.root / path
        if not file.is_file() or file.stat().st_size != proof["bytes"] or sha256_of_file(file) != proof["sha256"]:
            yield path


def _owned(writer: StoreWriter, pass_id: str, receipt: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the files of a shard with their proofs, without what was dropped since: another pass may have made it."""
    for path, proof in receipt["files"].items():
        if writer.layout.artifacts.get(artifact_of(path.removeprefix(f"{ARRAYS}/"))) == pass_id:
            yield path, proof


def _give_up(writer: StoreWriter, pass_id: str, receipts: Receipts, damaged: Mapping[int, tuple[str, ...]]) -> None:
    kept = receipts.keys() - damaged.keys()
    for segment in writer.layout.segments:
        shards = range(segment.first_shard, segment.first_shard + segment.n_shards)
        if any(shard in damaged for shard in shards):
            _unseal(writer, pass_id, segment, {one: receipts[one] for one in shards if one in kept})
    for shard in damaged:
        (writer.root / receipt_file(pass_id, shard)).unlink(missing_ok=True)
        for path, _ in _owned(writer, pass_id, receipts.get(shard, {"files": {}})):
            (writer.root / path).unlink(missing_ok=True)


def _unseal(writer: StoreWriter, pass_id: str, segment: Segment, kept: Receipts) -> None:
    """Give the shards of a segment their own receipts back, as if the last one had not been made yet.

    Whoever dies in between leaves the manifest, whose shards still count as made: repairing again goes on from there.
    """
    manifest = writer.root / manifest_file(pass_id, segment.segment)
    if not manifest.exists():
        return
    for shard, receipt in kept.items():
        file = writer.root / receipt_file(pass_id, shard)
        make_directory(file.parent)
        write_sealed(file, receipt)
    left = tuple(one for one in writer.layout.sealed.get(pass_id, ()) if one != segment.segment)
    sealed = {one: segments for one, segments in {**writer.layout.sealed, pass_id: left}.items() if segments}
    writer.layout = replace(writer.layout, sealed=sealed)
    write_sealed(writer.root / LAYOUT_FILE, writer.layout.to_json())
    manifest.unlink()
