"""Working through the shards of a pass, together with whoever else does: claim, run, commit, until none is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actstore.blocks import ShardBlock, TokenShard
from actstore.errors import InvalidInput, explain
from actstore.progress import Report
from actstore.run_report import RunReport, bound_of
from actstore.store import Journal, PassWriter, StoreReader

from .memory import peak_memory_bytes
from .pipeline import Committed, Committer
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    import torch

__all__ = ["Outcome", "ShardMaker", "run_pass", "whole_shard"]

WAIT_SECONDS = 0.5


class ShardMaker(Protocol):
    """What makes the numbers of a pass: a model, or coders and lenses over stored sites."""

    @property
    def doing(self) -> str:
        """What a report calls the work."""

    @property
    def device(self) -> torch.device:
        """The device that the numbers come from."""

    @property
    def watch(self) -> Stopwatch:
        """What measures the device's work."""

    def start(self, shard: TokenShard) -> Callable[[], ShardBlock]:
        """Begin everything that the pass makes of a shard; return what waits for it, in another thread."""


@dataclass(frozen=True)
class Outcome:
    """What a run did: the pass, the shards that this process made, and what is complete.

    `unfinished` are other passes of the store that lack shards, such as those of an appended segment.
    `report` says how the run went; None where there was nothing to make.
    """

    pass_id: str
    n_shards_made: int
    n_rows_made: int
    seconds: float
    complete: bool
    unfinished: tuple[str, ...] = ()
    report: RunReport | None = None


def run_pass(
    passing: PassWriter, maker: ShardMaker, report: Report, *, mixed: bool, shards: Collection[int] | None = None
) -> Outcome:
    """Make what a pass still lacks, seal it where it is whole, and write down how it went.

    Of all shards, or of those in `shards`: others cannot be made yet.
    Raises InvalidInput where the pass was begun on another type of device, unless `mixed`.
    """
    reader = StoreReader(passing.root)
    if not mixed:
        _refuse_other_device(passing, reader, maker.device.type)
    makeable = range(passing.writer.layout.n_shards) if shards is None else shards
    run = _Run(passing, reader, maker, makeable, Journal(passing.root), report)
    run.journal.write("begin", pass_id=passing.pass_id, device=maker.device.type)
    try:
        run.through()
        complete = passing.seal()
    except BaseException:
        with suppress(Exception):  # what ended the run is the reason, and the device may be lost with it
            run.end(complete=False)
        raise
    went = run.end(complete=complete)
    others = tuple(one for one in passing.writer.layout.passes if one != passing.pass_id)
    unfinished = tuple(one for one in others if PassWriter(passing.writer, one).pending())
    return Outcome(passing.pass_id, run.n_shards, run.n_rows, run.seconds, complete, unfinished, went)


@dataclass
class _Run:
    """This process' part of a pass."""

    passing: PassWriter
    reader: StoreReader
    maker: ShardMaker
    makeable: Collection[int]
    journal: Journal
    report: Report
    n_shards: int = 0
    n_rows: int = 0
    n_bytes: int = 0
    seconds: float = 0.0
    written_seconds: float = 0.0
    waited_seconds: float = 0.0  # for the shard before to be written
    _done: int = 0  # shards, whoever made them, as far as this process has looked
    _started: float = field(default_factory=time.perf_counter)

    def through(self) -> None:
        """Make every makeable shard that nobody has made, and wait for those that others are making."""
        while pending := [shard for shard in self.passing.pending() if shard in self.makeable]:
            self._tell(len(self.makeable) - len(pending))
            before = self.n_shards
            with Committer(self.passing, self._committed) as committer:
                try:
                    for shard in pending:
                        self._make(shard, committer)
                finally:
                    self.waited_seconds += committer.waited_seconds
            if self.n_shards == before:
                time.sleep(WAIT_SECONDS)  # others have claimed all that is left
        self._tell(len(self.makeable))

    def _make(self, shard: int, committer: Committer) -> None:
        """Make a shard, unless somebody else has made it or is at it."""
        claim = None if self.passing.has_receipt(shard) else self.passing.claim(shard)
        if claim is None:
            return
        with ExitStack() as held:
            held.enter_context(claim)
            if not self.passing.has_receipt(shard):
                committer.commit(self.maker.start(whole_shard(self.reader, shard)), held.pop_all())

    def _committed(self, done: Committed) -> None:
        self.n_shards += 1
        self.n_rows += done.n_rows
        self.n_bytes += done.n_bytes
        self.written_seconds += done.seconds
        self.journal.write(
            "shard", pass_id=self.passing.pass_id, shard=done.shard, n_rows=done.n_rows, write_seconds=done.seconds
        )
        self._tell(self._done + 1)

    def _tell(self, done: int) -> None:
        self._done = done
        self.report(self.maker.doing, done, len(self.makeable), "shards")

    def end(self, *, complete: bool) -> RunReport | None:
        """Write down how it went, whatever ended it, and return it; None where nothing was made."""
        self.seconds = time.perf_counter() - self._started
        went = self._went()
        self.journal.write(
            "end",
            pass_id=self.passing.pass_id,
            n_shards=self.n_shards,
            complete=complete,
            report=None if went is None else went.to_json(),
        )
        return went

    def _went(self) -> RunReport | None:
        if not self.n_shards:
            return None
        work = self.maker.watch.seconds()
        return RunReport(
            n_rows=self.n_rows,
            seconds=self.seconds,
            work_seconds=work,
            waited_share=max(0.0, 1 - sum(work.values()) / self.seconds),
            written_seconds=self.written_seconds,
            written_bytes=self.n_bytes,
            peak_memory_bytes=peak_memory_bytes(),
            peak_device_memory_bytes=_peak_device_memory(self.maker.device),
            bound_by=bound_of(work, self.waited_seconds / self.seconds),
        )


def _peak_device_memory(device: torch.device) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


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
