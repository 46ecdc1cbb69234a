"""Read an SAE's configuration, JSON that nobody vouches for, and collect everything that is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actstore.errors import InvalidInput, MissingInput, explain

__all__ = ["Config", "read_config"]

_LARGEST_BYTES = 1 << 22  # the longest are complete training configurations of some kilobytes
_LARGEST_COUNT = 1 << 40
_LARGEST_NUMBER = 1e30


@dataclass
class Config:
    """The keys of a configuration; what is read of it and is wrong becomes a fault and a harmless value."""

    body: Mapping[str, Any]
    faults: list[str] = field(default_factory=list)

    def text(self, name: str, default: str = "") -> str:
        """Return a string, or `default` where the key is not there or null."""
        value = self._value(name, default)
        return value if isinstance(value, str) else self._fault(name, "a string", default)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false, or `default` where the key is not there or null."""
        value = self._value(name, default)
        return value if isinstance(value, bool) else self._fault(name, "true or false", default)

    def count(self, name: str) -> int | None:
        """Return a positive whole number, or None where the key is not there or null."""
        value = self._value(name, None)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_COUNT:
            return value
        if value is not None:
            self._fault(name, "a positive whole number", None)
        return None

    def number(self, name: str) -> float | None:
        """Return a finite number above 0, or None where the key is not there or null."""
        value = self._value(name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= _LARGEST_NUMBER:
            return float(value)
        if value is not None:
            self._fault(name, "a number above 0", None)
        return None

    def inner(self, name: str) -> Config:
        """Return the object under a key, empty where it is not there; its faults are this one's."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            value = self._fault(name, "an object", {})
        return Config(value, self.faults)

    def require(self, name: str, *accepted: Any) -> None:
        """Make it a fault where a key is there with another value than these, null aside."""
        value = self._value(name, accepted[0])
        if not any(value == one and type(value) is type(one) for one in accepted):
            self.faults.append(f"{name} is {_shown(value)}, and only {' or '.join(map(_shown, accepted))} is read")

    def only(self, known: Collection[str]) -> None:
        """Make every other key a fault: what is not known could change the equation."""
        self.faults += [
            f"{name} is not known, and could change the equation" for name in self.body if name not in known
        ]

    def _value(self, name: str, default: Any) -> Any:
        value = self.body.get(name)
        return default if value is None else value

    def _fault(self, name: str, accepted: str, default: Any) -> Any:
        self.faults.append(f"{name} is {_shown(self.body[name])}, not {accepted}")
        return default


def read_config(path: Path) -> Config:
    """Return a configuration; raises MissingInput where it is not there, InvalidInput where it is no JSON object."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_BYTES + 1)
    except FileNotFoundError as error:
        raise MissingInput(
            explain(f"The file {path} is not there", next_step="fetch it from beside the weights")
        ) from error
    try:
        body = json.loads(content) if len(content) <= _LARGEST_BYTES else None
    except (ValueError, RecursionError) as error:
        raise _no_object(path) from error
    if not isinstance(body, dict):
        raise _no_object(path)
    return Config(body)


def _no_object(path: Path) -> InvalidInput:
    return InvalidInput(
        explain(f"{path} is not a configuration", accepted=f"a JSON object of at most {_LARGEST_BYTES:,} bytes")
    )


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]
