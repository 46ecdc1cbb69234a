"""What is wrong with a file that nobody vouches for: found one by one, told together, and never at its own length."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Unreadable", "spelled"]

_MOST = 10  # a file could have a million names that are not part of its format
_LONGEST = 300  # characters of each


class Unreadable(Exception):
    """The faults of one file; translated by the caller, who knows the file's name."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(spelled(faults))
        self.faults = faults


def spelled(faults: Sequence[str]) -> str:
    """Return faults for a message, the first ten and how many more there are."""
    shown = [fault if len(fault) <= _LONGEST else f"{fault[:_LONGEST]}…" for fault in faults[:_MOST]]
    return "; ".join(shown + ([f"and {len(faults) - _MOST:,} more"] if len(faults) > _MOST else []))
