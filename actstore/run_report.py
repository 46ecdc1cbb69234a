"""How a run went: what it was bound by, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["DISK", "RunReport", "bound_of"]

DISK = "disk"
WAITED_MUCH = 0.1  # of the time: above this the disk, or what is written before it, was too slow


@dataclass(frozen=True)
class RunReport:
    """One process' part of a pass; written to the journal, printed at its end and shown by `actstore info`.

    seconds: from the first claim to the last receipt. work_seconds: of the device, by kind of work; waited_share: of
    the time, in which it did nothing. written_seconds and written_bytes: compressing, proving and writing, which goes
    on beside the device's work. peak_memory_bytes: of the process since it began, and of the CUDA device.
    """

    n_rows: int
    seconds: float
    work_seconds: Mapping[str, float]
    waited_share: float
    written_seconds: float
    written_bytes: int
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    bound_by: str

    @property
    def rows_per_second(self) -> float:
        return self.n_rows / self.seconds if self.seconds else 0.0

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> RunReport | None:
        """Return the report that a journal says; None where another version wrote it in other words."""
        names = {one.name for one in fields(cls)}
        return cls(**{name: body[name] for name in names}) if names <= body.keys() else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{work} {seconds:.1f} s" for work, seconds in self.work_seconds.items())
        on_device = self.peak_device_memory_bytes
        device = "" if on_device is None else f" and {_mb(on_device)} on the GPU"
        return (
            f"{self.rows_per_second:.0f} tokens/s, bound by {self.bound_by} ({parts}; waited {self.waited_share:.0%} "
            f"of the time); {_mb(self.written_bytes)} written in {self.written_seconds:.1f} s beside that; "
            f"peak memory {_mb(self.peak_memory_bytes)}{device}"
        )


def bound_of(work_seconds: Mapping[str, float], waited_share: float) -> str:
    """Return what a faster run would need more of: the disk where the device waited for it, else its longest work."""
    if waited_share > WAITED_MUCH or not work_seconds:
        return DISK
    return max(work_seconds, key=lambda work: work_seconds[work])


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.0f} MB"
