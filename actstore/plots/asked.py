"""What an answer answers: the query with its parameters, and the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Asked"]


@dataclass(frozen=True)
class Asked:
    """The question behind an answer; a picture takes its title from it."""

    query: str = ""  # a named query; empty for SQL
    parameters: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""  # model and store, as people would name them

    def parameter(self, name: str) -> str:
        """Return a parameter as text, a list with | between; empty where it was not given."""
        value = self.parameters.get(name)
        if isinstance(value, (list, tuple)):
            return "|".join(map(str, value))
        return "" if value is None else str(value)
