"""One proof's result: a row of the table `health`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

__all__ = ["HealthCheck", "check_text"]


@dataclass(frozen=True)
class HealthCheck:
    """What was proved about what: the value found, what was expected, and whether it holds.

    `value` is None where nothing finite was measured; `ok` is None where nothing is proved, e.g. by too few rows.
    """

    name: str  # the proof: "residual_sum", "sae_fvu", …
    subject: str  # the site or SAE that it is about
    value: float | None
    expected: str
    ok: bool | None

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            object.__setattr__(self, "value", None)  # neither JSON nor a table column should carry NaN

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Return the check that `to_json` wrote; raises TypeError for fields it does not know."""
        return cls(**body)


def check_text(check: Mapping[str, Any]) -> str:
    """Return a row of the table `health` as a sentence for people; its value has four significant digits."""
    value = "not a number" if check["value"] is None else f"{check['value']:.4g}"
    return f"{check['name']} of {check['subject']} is {value}, expected {check['expected']}"
