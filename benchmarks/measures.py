"""What a benchmark found, beside what it must reach: printed as one table, and handed to whoever asked for all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["COLLECTED", "Measure", "read_measures", "show", "table"]

COLLECTED = "ACTSTORE_MEASURES"  # the file to which measures are added, where somebody collects them


@dataclass(frozen=True)
class Measure:
    """One figure: what must be reached, what is aimed at. `less` where smaller is better, as of times and sizes."""

    name: str
    measured: float
    floor: float
    aim: float
    unit: str = ""
    less: bool = False

    @property
    def verdict(self) -> str:
        """Return "aim", "floor" or "MISSED"."""
        if self._reaches(self.aim):
            return "aim"
        return "floor" if self._reaches(self.floor) else "MISSED"

    def _reaches(self, target: float) -> bool:
        return self.measured <= target if self.less else self.measured >= target


def show(measures: Iterable[Measure]) -> None:
    """Print measures, and add them to the file that collects those of all benchmarks."""
    found = list(measures)
    print(table(found), flush=True)
    if os.environ.get(COLLECTED):
        with Path(os.environ[COLLECTED]).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(one)) + "\n" for one in found)


def read_measures(path: Path) -> list[Measure]:
    """Return what benchmarks added to a file, in their order."""
    return [Measure(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def table(measures: Iterable[Measure]) -> str:
    """Return the table: measure, what is measured, floor, aim, what was reached."""
    lines = [f"{'measure':<66} {'measured':>9} {'floor':>8} {'aim':>8} {'unit':<7} reached"]
    lines += [
        f"{one.name:<66} {one.measured:>9.4g} {_sign(one)}{one.floor:>6.4g} {_sign(one)}{one.aim:>6.4g} "
        f"{one.unit:<7} {one.verdict}"
        for one in measures
    ]
    return "\n".join(lines)


def _sign(measure: Measure) -> str:
    return "≤ " if measure.less else "≥ "
