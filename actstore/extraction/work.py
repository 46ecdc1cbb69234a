"""Working through the shards of a pass, together with whoever else does: claim, run, commit, until none is left."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actstore.blocks import ShardBlock, TokenShard
from actstore.errors import InvalidInput, explain
from actstore.progress import Report
from actstore.store import Journal, PassWriter, StoreReader

__all__ = ["Made", "Outcome", "ShardMaker", "run_pass", "whole_shard", "work_through"]

WAIT_SECONDS = 0.5


class ShardMaker(Protocol):
    """What makes the numbers of a pass: a model, or coders and lenses over stored sites."""

    @property
    def doing(self) -> str:
        """What a report calls the work."""

    @property
    def device_type(self) -> str:
        """The type of device that the numbers come from."""

    def run(self, shard: TokenShard) -> ShardBlock:
        """Return everything that the pass makes of a shard."""


@dataclass(frozen=True)
class Outcome:
    """What a run did: the pass, the shards that this process made, and what is complete.

    `unfinished` are other passes of the store that lack shards, such as those of an appended segment.
    """

    pass_id: str
    n_shards_made: int
    n_rows_made: int
    seconds: float
    complete: bool
    unfinished: tuple[str, ...] = ()


def run_pass(
    passing: PassWriter, maker: ShardMaker, report: Report, *, mixed: bool, shards: Collection[int] | None = None
) -> Outcome:
    """Make what a pass still lacks, seal it where it is whole, and write down how it went.

    Of all shards, or of those in `shards`: others cannot be made yet. Raises as `work_through`.
    """
    started = time.monotonic()
    journal = Journal(passing.root)
    journal.write("begin", pass_id=passing.pass_id, device=maker.device_type)
    makeable = range(passing.writer.layout.n_shards) if shards is None else shards
    made = work_through(passing, StoreReader(passing.root), maker, makeable, mixed, journal, report)
    seconds = time.monotonic() - started
    complete = passing.seal()
    journal.write(
        "end", pass_id=passing.pass_id, n_shards=made.n_shards, n_rows=made.n_rows, seconds=seconds, complete=complete
    )
    others = tuple(one for one in passing.writer.layout.passes if one != passing.pass_id)
    unfinished = tuple(one for one in others if PassWriter(passing.writer, one).pending())
    return Outcome(passing.pass_id, made.n_shards, made.n_rows, seconds, complete, unfinished)


@dataclass
class Made:
    """What this process made."""

    n_shards: int = 0
    n_rows: int = 0


def work_through(
    passing: PassWriter,
    reader: StoreReader,
    maker: ShardMaker,
    makeable: Collection[int],
    mixed: bool,
    journal: Journal,
    report: Report,
) -> Made:
    """Make every makeable shard that nobody has made, and wait for those that others are making.

    Raises InvalidInput where the pass was begun on another type of device, unless `mixed`.
    """
    made = Made()
    if not mixed:
        _refuse_other_device(passing, reader, maker.device_type)
    n_shards = len(makeable)
    while pending := [shard for shard in passing.pending() if shard in makeable]:
        report(maker.doing, n_shards - len(pending), n_shards, "shards")
        if not _round(passing, reader, maker, pending, made, journal, report, n_shards):
            time.sleep(WAIT_SECONDS)  # others have claimed all that is left
    report(maker.doing, n_shards, n_shards, "shards")
    return made


def _round(
    passing: PassWriter,
    reader: StoreReader,
    maker: ShardMaker,
    pending: list[int],
    made: Made,
    journal: Journal,
    report: Report,
    n_shards: int,
) -> bool:
    """Try each pending shard once; return whether this process made any."""
    before = made.n_shards
    for n_tried, shard in enumerate(pending, start=1):
        claim = None if passing.has_receipt(shard) else passing.claim(shard)
        if claim is None:
            continue
        with claim:
            if passing.has_receipt(shard):
                continue
            started = time.monotonic()
            block = maker.run(whole_shard(reader, shard))
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
        report(maker.doing, n_shards - len(pending) + n_tried, n_shards, "shards")
    return made.n_shards > before


def whole_shard(reader: StoreReader, shard: int) -> TokenShard:
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
