"""benchmarks/gpu.py runs as it is on whatever device is here; what it says of a GPU nobody can test without one."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LINES = (
    "bare forward, no logits",
    "dense, layer 1 (stops there)",
    "dense, 3 layers, bf16",
    "SAE, layer 1 (stops there)",
    "SAEs, 3 layers, screen",
    "SAEs, 3 layers, float32",
    "SAEs, 3 layers, TF32",
    "attention, top 8",
    "dense, 3 layers, int8",
)


@pytest.mark.slow
def test_one_call_measures_everything(tmp_path: Path) -> None:
    program = [sys.executable, str(BENCHMARKS / "gpu.py"), "--shape", "small", "--folder", str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " failed: " not in done.stdout, done.stdout + done.stderr
    figures = {line: _figures(done.stdout, line) for line in LINES}
    assert all(found and found[0] > 0 for found in figures.values()), figures
    forward = figures[LINES[0]][0]
    for line in LINES[1:]:
        tokens_per_second, ratio = figures[line][:2]
        assert ratio == pytest.approx(tokens_per_second / forward, abs=0.01)
    assert re.search(r"^screen +0 pairs", done.stdout, re.MULTILINE), done.stdout
    assert not list(tmp_path.iterdir()), "everything that it wrote is gone"


def _figures(text: str, line: str) -> list[float]:
    """Return the numbers of the table's line."""
    rest = next(one.removeprefix(line) for one in text.splitlines() if one.startswith(line))
    return [float(number) for number in re.findall(r"(?<=\s)[\d.]+(?=\s|$)", rest)]


def bench(monkeypatch: pytest.MonkeyPatch, minutes_left: float) -> Any:
    """Return what the sections share, without a model: none of it is asked for one."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch
    from gpu import Bench
    from gpu_workload import SHAPES

    deadline = time.monotonic() + 60 * minutes_left
    return Bench(Path(), SHAPES["small"], torch.device("cpu"), [], None, deadline, None)  # type: ignore[arg-type]


def broken() -> None:
    raise ValueError("this device cannot\nand more")


def test_a_section_that_fails_is_named_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = bench(monkeypatch, minutes_left=1)
    shared.attempt("first", broken)
    shared.attempt("second", lambda: print("measured"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].split(maxsplit=1) == ["first", "failed: ValueError: this device cannot"]
    assert said[1] == "measured" and shared.has_failed


def test_no_section_begins_when_time_is_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shared = bench(monkeypatch, minutes_left=-1)
    shared.attempt("late", broken)
    assert "late" in (said := capsys.readouterr().out) and "not measured" in said and not shared.has_failed
