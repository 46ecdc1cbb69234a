"""Doing the next things meanwhile: a second core reads or writes while the first one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
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


def behind(use: Callable[[Made], None], made: Iterable[Made]) -> None:
    """Call `use` for each, in order, in a thread of its own, while the next one is made."""
    with ThreadPoolExecutor(1) as pool:
        used: Future[None] | None = None
        for one in made:
            if used is not None:
                used.result()
            used = pool.submit(use, one)
        if used is not None:
            used.result()
