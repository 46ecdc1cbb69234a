"""The proof by competition on the embedded world: every SAE is accepted at its own site and at no other."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from actstore.demo import assets
from actstore.models import load_model
from actstore.saes import expand_sae_arguments, load_sae

N_ROWS = 1200


@pytest.fixture(scope="module")
def program() -> ModuleType:
    """The program that writes docs/health.md, on fewer rows."""
    path = Path(__file__).resolve().parent.parent / "tools" / "make_health.py"
    spec = importlib.util.spec_from_file_location("make_health", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.N_ROWS = N_ROWS  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="module")
def rows(program: ModuleType) -> Any:
    return program.plain_rows(load_model(str(assets().model), dtype="float32", device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("path", assets().saes, ids=lambda path: path.parts[-4])
def test_an_sae_is_accepted_at_its_own_site_alone(program: ModuleType, rows: Any, path: Path) -> None:
    coder = load_sae(expand_sae_arguments([str(path)])[0])
    assert program.verdict(coder, rows)[2] == "accepted"
    moved = [(name, wrong) for name, wrong in program.wrong_places(coder, rows) if name.startswith("read at")]
    assert len(moved) >= 3
    for name, wrong in moved:
        assert program.verdict(wrong, rows)[2] != "accepted", name


def test_the_page_says_what_was_measured() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "health.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and "gemmascope" in line]
    assert len(lines) > 50 and sum(line[1] == "rightly" for line in lines) == len(assets().saes)
    for line in lines:
        if line[1] == "rightly" or line[1].startswith("read at"):
            assert ("accepted" in line[4]) == (line[1] == "rightly"), line
    refused = [line[4] for line in lines if line[1] in ("weights transposed", "a model with unscaled embeddings")]
    assert len(refused) == 2 * len(assets().saes) and all("refused" in said for said in refused)


def test_a_model_that_forgets_the_scale_of_its_embedding_is_refused(program: ModuleType) -> None:
    model = load_model(str(assets().model), dtype="float32", device="cpu")
    assert program.refusal_of_model(model) == "model accepted"
    assert program.refusal_of_model(program.unscaled(model)) == "model refused (scale of the embedding)"
