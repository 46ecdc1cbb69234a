"""The wheel holds all that the tree has, and nothing beside `actstore`."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("actstore", "cli", "queries", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build a wheel from a copy of the tree, with what is installed and no network."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed here")
    tree = tmp_path_factory.mktemp("tree")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tree / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(built)


def files_of_the_tree() -> dict[str, Path]:
    """Return every file that must be installed, by its name in the wheel."""
    found = {}
    for folder, home in (("actstore", "actstore"), ("cli", "actstore/cli"), ("queries", "actstore/queries")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"{home}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return found


@pytest.mark.slow
def test_the_wheel_is_the_tree(wheel: zipfile.ZipFile) -> None:
    expected = files_of_the_tree()
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == set(expected)
    for name in packed:
        assert wheel.read(name) == expected[name].read_bytes(), name


@pytest.mark.slow
def test_the_wheel_has_one_top_level_package_and_its_door(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"actstore"}
    for name in ("actstore/py.typed", "actstore/queries/logit_lens.sql", "actstore/cli/main.py"):
        assert name in wheel.namelist()
    assert any(name.startswith("actstore/demo/assets/model/") for name in wheel.namelist())
    entry = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "actstore = actstore.cli:main" in entry
    assert "actstore.bfloat16 = actstore.store.bfloat16:BFloat16" in entry
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


@pytest.mark.slow
def test_what_was_unpacked_runs_without_the_repository(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "installed")
    program = (
        "import actstore, actstore.cli; from actstore.named import load_queries; "
        "print(actstore.__file__, len(load_queries()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    where, n_queries = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path) and int(n_queries) >= 7
