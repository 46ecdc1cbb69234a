"""How long each kind of work took on the device that did it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Stopwatch"]


@dataclass
class Stopwatch:
    """Sums of seconds by the name of the work.

    On CUDA, kernels run later than they are called: events in their stream are read when the sums are asked for.
    """

    _seconds: dict[str, float] = field(default_factory=dict)
    _pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def measuring(self, work: str, device: torch.device) -> Iterator[None]:
        """Add the time of what happens inside to `work`."""
        if device.type == "cuda":
            began = _event(device)
            yield
            self._pending.append((work, began, _event(device)))
            self._collect(wait=False)
            return
        started = time.perf_counter()
        yield
        self._add(work, time.perf_counter() - started)

    def seconds(self) -> dict[str, float]:
        """Return the sums so far; waits for the device."""
        self._collect(wait=True)
        return dict(self._seconds)

    def _collect(self, *, wait: bool) -> None:
        """Add what the device has finished."""
        while self._pending:
            work, began, ended = self._pending[0]
            if not wait and not ended.query():  # type: ignore[no-untyped-call]
                return
            ended.synchronize()
            del self._pending[0]
            self._add(work, began.elapsed_time(ended) / 1000)

    def _add(self, work: str, seconds: float) -> None:
        self._seconds[work] = self._seconds.get(work, 0.0) + seconds


def _event(device: torch.device) -> torch.cuda.Event:
    import torch

    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
