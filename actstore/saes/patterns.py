"""Paths and names with slashes: matched by patterns, and sorted by the numbers in them."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

__all__ = ["by_numbers", "matches"]


def by_numbers(path: str) -> list[tuple[int, str]]:
    """Return a key that sorts paths with numbers compared as numbers: layer_2 before layer_10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path)]


def matches(path: str, pattern: str) -> bool:
    """Return whether a pattern matches a path, part by part between slashes."""
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
