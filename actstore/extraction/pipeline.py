"""Writing beside the model: while a shard is computed, the one before it is compressed, proved and made durable."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType

from actstore.blocks import ShardBlock
from actstore.store import PassWriter

__all__ = ["Committed", "Committer"]


@dataclass(frozen=True)
class Committed:
    """A shard that is durable."""

    shard: int
    n_rows: int
    n_bytes: int
    seconds: float


@dataclass
class Committer:
    """Commits one shard at a time in a thread, with its claim; a context manager.

    No more than one shard is being written while the next is made, so memory does not grow with a slow disk: `commit`
    waits for the shard before, `waited_seconds` in all. Whatever ends the work, an error or Ctrl-C, the shard in hand
    is finished first.
    """

    passing: PassWriter
    committed: Callable[[Committed], None]
    waited_seconds: float = 0.0
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="commit"))
    _last: Future[Committed] | None = None

    def __enter__(self) -> Committer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:  # else what ended the work is the reason, and both may be
                raise
        finally:
            self._pool.shutdown()

    def commit(self, finish: Callable[[], ShardBlock], claim: ExitStack) -> None:
        """Write a shard when the one before is durable; the claim is given back with it.

        Raises NoSpace where the shard before found the disk full: it has no receipt and is made again later.
        """
        started = time.perf_counter()
        try:
            self.wait()
        except BaseException:
            claim.close()
            raise
        self.waited_seconds += time.perf_counter() - started
        self._last = self._pool.submit(self._commit, finish, claim)

    def wait(self) -> None:
        """Wait for the shard in hand; raises what kept it from being written."""
        if self._last is None:
            return
        last, self._last = self._last, None
        self.committed(last.result())

    def _commit(self, finish: Callable[[], ShardBlock], claim: ExitStack) -> Committed:
        started = time.perf_counter()
        with claim:
            block = finish()
            n_bytes = self.passing.commit(block)
        return Committed(block.shard, block.n_rows, n_bytes, time.perf_counter() - started)
