"""The notebooks in examples/ are what their sources say, run in a fresh kernel, and show what they showed before."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "examples" / "src").glob("*.py"))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
MOST_BYTES = 400_000

each_notebook = pytest.mark.parametrize("name", NAMES)


@cache
def program() -> Any:
    """Return tools/make_notebooks.py as a module."""
    spec = importlib.util.spec_from_file_location("make_notebooks", ROOT / "tools" / "make_notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name: str) -> Any:
    """Return a notebook as it lies in examples/."""
    return nbformat.read(program().page(name), as_version=4)


def outputs(notebook: Any) -> list[Any]:
    """Return every output, in order."""
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def printed(notebook: Any) -> str:
    """Return what the cells print: the key numbers of the text."""
    return "".join(output.text for output in outputs(notebook) if output.get("name") == "stdout")


def kinds(notebook: Any) -> list[list[str]]:
    """Return, for each output, what a reader sees: a table, a picture, a text, a warning or an error."""
    return [sorted(output.get("data", {output.get("name", "error"): None})) for output in outputs(notebook)]


def test_there_are_the_four_notebooks() -> None:
    assert NAMES == ["attention", "how_a_list_ends", "logit_lens", "microscope"]


@each_notebook
def test_a_notebook_is_what_its_source_says(name: str) -> None:
    made = [(cell.cell_type, cell.source) for cell in program().unrun(name).cells]
    there = [(cell.cell_type, cell.source) for cell in committed(name).cells]
    assert there == made, f"run: python tools/make_notebooks.py {name}"


@each_notebook
def test_a_notebook_is_small_whole_and_of_no_machine(name: str) -> None:
    notebook, text = committed(name), program().page(name).read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", text)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not {"stderr", "error"} & set().union(*kinds(notebook))


@each_notebook
def test_a_notebook_marks_the_one_line_to_change_and_checks_what_it_says(name: str) -> None:
    code = [cell.source for cell in committed(name).cells if cell.cell_type == "code"]
    marked = [line for cell in code for line in cell.splitlines() if '"google/gemma-2-2b"' in line]
    assert len(marked) == 1 and marked[0].startswith("MODEL") and "the line to change" in marked[0]
    assert sum(line.startswith("assert ") for cell in code for line in cell.splitlines()) >= 5
    assert len(NUMBER.findall(printed(committed(name)))) >= 3


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_and_shows_the_same_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to other tests
    again, before = program().run(program().unrun(name), tmp_path), committed(name)
    assert kinds(again) == kinds(before)
    assert NUMBER.sub("#", printed(again)) == NUMBER.sub("#", printed(before))
    numbers = [[float(one) for one in NUMBER.findall(printed(notebook))] for notebook in (again, before)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.02)  # another machine adds in another order
