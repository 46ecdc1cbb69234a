"""How long work tells where it stands: one callable, so that rooms know no terminal."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Report", "silent"]

Report = Callable[[str, int, int | None, str], None]
"""Called with what is being done, how much is done, how much there is (None: unknown) and the unit."""


def silent(_doing: str, _done: int, _total: int | None, _unit: str) -> None:
    """Report nothing."""
