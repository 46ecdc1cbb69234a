"""Extractions in processes of their own, forked from one that has imported everything: each starts in milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tiny_world import TinyWorld, extract, tiny_world

__all__ = ["count_operations", "extract_limited", "start_extraction"]

PRELOADED = [
    "pandas",  # pyarrow imports it where it is
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gemma2.modeling_gemma2",
    "actstore.corpus",
    "actstore.extraction.run",
    "actstore.maintenance",
    "actstore.models",
    "actstore.saes",
]
OPERATIONS = ("fsync", "replace", "link", "unlink", "rmdir", "mkdir")  # what durability is made of


def processes() -> ForkServerContext:
    """Return the context in which children are started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_extraction(store: Path, *, dies_at: int | None = None, **changes: Any) -> BaseProcess:
    """Start extracting the world into a store; the process kills itself before its operation number `dies_at`."""
    process = processes().Process(target=_extract, args=(tiny_world(), store, dies_at, changes))
    process.start()
    return process


def _extract(world: TinyWorld, store: Path, dies_at: int | None, changes: dict[str, Any]) -> None:
    if dies_at is not None:
        _watch_operations(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == dies_at else None)
    extract(store, world, **changes)


def count_operations(store: Path) -> int:
    """Extract the world in a process, undisturbed; return how many operations that took."""
    return int(_answer(_count, store))


def _count(sender: Connection, world: TinyWorld, store: Path) -> None:
    numbers = [0]
    _watch_operations(numbers.append)
    extract(store, world)
    sender.send(numbers[-1])


def extract_limited(store: Path, *, n_shards: int, file_bytes: int) -> tuple[str, str]:
    """Extract in a process that may write no larger file after some shards; return the kind and text of its error."""
    kind, message = _answer(_extract_limited, store, n_shards, file_bytes)
    return kind, message


def _extract_limited(sender: Connection, world: TinyWorld, store: Path, n_shards: int, file_bytes: int) -> None:
    def report(doing: str, done: float, total: float | None, unit: str) -> None:
        if doing == "extracting" and done == n_shards:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))

    try:
        extract(store, world, report=report, with_index=False)
    except Exception as error:
        sender.send((type(error).__name__, str(error)))
    else:
        sender.send(("nothing", ""))


def _answer(target: Callable[..., None], *arguments: Any) -> Any:
    """Return what a child sends; raises EOFError where it dies before."""
    receiver, sender = processes().Pipe(duplex=False)
    process = processes().Process(target=target, args=(sender, tiny_world(), *arguments))
    process.start()
    sender.close()
    answer = receiver.recv()
    process.join()
    return answer


def _watch_operations(tell: Callable[[int], object]) -> None:
    """Tell the number of every operation on the file system that Python makes, just before it is made."""
    numbers = iter(range(1, 1 << 62))

    def watched(operation: Callable[..., Any]) -> Callable[..., Any]:
        def tell_and_do(*arguments: Any, **options: Any) -> Any:
            tell(next(numbers))
            return operation(*arguments, **options)

        return tell_and_do

    for name in OPERATIONS:
        setattr(os, name, watched(getattr(os, name)))
