"""Working through the shards of a pass, together with whoever else does: claim, run, commit, until none is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from actstore.blocks import ShardBlock, TokenShard
from actstore.errors import InvalidInput, explain
from actstore.progress import Report
from actstore.store import Journal, PassWriter, StoreReader

from .runner import ShardRunner

__all__ = ["Made", "work_through"]

WAIT_SECONDS = 0.5
RunShard = Callable[[TokenShard], ShardBlock]


@dataclass
class Made:
    """What this process made."""

    n_shards: int = 0
    n_rows: int = 0


def work_through(
    passing: PassWriter, reader: StoreReader, runner: ShardRunner, mixed: bool, journal: Journal, report: Report
) -> Made:
    """Make every shard that nobody has made, and wait for those that others are making.

    Raises InvalidInput where the pass was begun on another type of device, unless `mixed`.
    """
    made = Made()
    if not mixed:
        _refuse_other_device(passing, reader, runner.model.device.type)
    n_shards = passing.writer.layout.n_shards
    while pending := passing.pending():
        report("extracting", n_shards - len(pending), n_shards, "shards")
        if not _round(passing, reader, runner.run, pending, made, journal, report):
            time.sleep(WAIT_SECONDS)  # others have claimed all that is left
    report("extracting", n_shards, n_shards, "shards")
    return made


def _round(
    passing: PassWriter,
    reader: StoreReader,
    run: RunShard,
    pending: list[int],
    made: Made,
    journal: Journal,
    report: Report,
) -> bool:
    """Try each pending shard once; return whether this process made any."""
    before, n_shards = made.n_shards, passing.writer.layout.n_shards
    for n_tried, shard in enumerate(pending, start=1):
        claim = None if passing.has_receipt(shard) else passing.claim(shard)
        if claim is None:
            continue
        with claim:
            if passing.has_receipt(shard):
                continue
            started = time.monotonic()
            block = run(_tokens(reader, shard))
            ran = time.monotonic()
            passing.commit(block)
        made.n_shards += 1
        made.n_rows += block.n_rows
        journal.write(
            "shard",
            pass_id=passing.pass_id,
            shard=shard,
            n_rows=block.n_rows,
            run_seconds=ran - started,
            write_seconds=time.monotonic() - ran,
        )
        report("extracting", n_shards - len(pending) + n_tried, n_shards, "shards")
    return made.n_shards > before


def _tokens(reader: StoreReader, shard: int) -> TokenShard:
    """Return a shard's tokens with its filler."""
    used = reader.tokens(shard)
    values = np.full((reader.shard_rows, used.shape[1]), -1, dtype=np.int32)
    values[: len(used)] = used
    return TokenShard(shard, values)


def _refuse_other_device(passing: PassWriter, reader: StoreReader, device_type: str) -> None:
    for receipt in reader.receipts.get(passing.pass_id, {}).values():
        began = receipt["provenance"]["device_type"]
        if began != device_type:
            raise InvalidInput(
                explain(
                    f"The pass was begun on {began}, this run is on {device_type}: the numbers would differ slightly",
                    accepted=f"--device {began}",
                    next_step="resume there, or add --mixed; each receipt says which device made its shard",
                )
            )
