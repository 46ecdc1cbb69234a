"""Doing the next things meanwhile: a second core reads or writes while the first one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import TypeVar

__all__ = ["ahead", "behind"]

Given = TypeVar("Given")
Made = TypeVar("Made")


def ahead(make: Callable[[Given], Made], given: Iterable[Given], n_threads: int) -> Generator[Made, None, None]:
    """Yield what `make` returns for each, in order, while as many threads already make the next ones."""
    pending: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for one in given:
                pending.append(pool.submit(make, one))
                if len(pending) > n_threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def behind(use: Callable[[Made], None], made: Iterable[Made], n_waiting: int = 1) -> None:
    """Call `use` for each, in order, in a thread of its own, while so many of the next are made.

    Where one call takes as long as making many, these are made meanwhile. Nothing is used after an error.
    """
    pending: deque[Future[None]] = deque()
    failed = Event()

    def use_next(one: Made) -> None:
        if not failed.is_set():
            try:
                use(one)
            except BaseException:
                failed.set()
                raise

    with ThreadPoolExecutor(1) as pool:
        for one in made:
            if len(pending) >= n_waiting:
                pending.popleft().result()
            pending.append(pool.submit(use_next, one))
        for future in pending:
            future.result()
