"""Every part of an index stays open: how many files a process may have open, and what is said of too few."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from index_support import HALF, FakeSource

from actstore.index import Catalog, build_index

N_SAES = 60
ASK = """
import json, resource, sys
from pathlib import Path
import actstore.index as index
from actstore.errors import ActstoreError

held = [open("/dev/null") for _ in range(int(sys.argv[4]))]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
catalog = index.Catalog.from_bytes(Path(sys.argv[1]).read_bytes(), "catalog")
said = n = None
try:
    with index.open_index(catalog, lambda name: Path(sys.argv[1]).parent / name, threads=1) as connection:
        n = connection.sql("SELECT count(DISTINCT sae) AS n FROM activations").table["n"][0].as_py()
except ActstoreError as error:
    said = [type(error).__name__, str(error)]
print(json.dumps({"n": n, "said": said, "limits": resource.getrlimit(resource.RLIMIT_NOFILE)}))
"""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of many SAEs, all of which are the same file under other names."""
    directory: Path = tmp_path_factory.mktemp("index")
    source = FakeSource()
    source.extract(0)
    built = build_index(source, directory)
    (part,) = built.select("firings", HALF)
    copies = [replace(part, subject=f"sae-{number}", name=f"firings.x{number}.duckdb") for number in range(N_SAES)]
    for one in copies:
        os.link(directory / part.name, directory / one.name)
    (directory / "many.json").write_bytes(Catalog(built.number, tuple(copies), built.next_number).to_bytes())
    return directory / "many.json"


def asked(catalog: Path, soft: int, hard: int, n_open: int = 0) -> dict[str, Any]:
    """Ask, in a process with these limits and so many more open files, how many SAEs there are."""
    given = [str(catalog), str(soft), str(hard), str(n_open)]
    done = subprocess.run([sys.executable, "-c", ASK, *given], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_soft_limit_rises_where_the_parts_would_reach_it(catalog: Path) -> None:
    found = asked(catalog, N_SAES, 1000)
    assert found["n"] == N_SAES and found["said"] is None
    assert N_SAES < found["limits"][0] < 1000 and found["limits"][1] == 1000


def test_what_is_open_already_counts(catalog: Path) -> None:
    found = asked(catalog, 512, 2000, n_open=480)
    assert found["n"] == N_SAES and found["limits"][0] > 480 + N_SAES


def test_a_limit_that_is_high_enough_stays(catalog: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert asked(catalog, 1024, hard)["limits"] == [1024, hard]


def test_too_few_files_are_no_damage(catalog: Path) -> None:
    found = asked(catalog, N_SAES, N_SAES)
    kind, message = found["said"]
    assert kind == "NoSpace" and f"may have {N_SAES} files open" in message
    assert "firings.x" in message and "ulimit -n" in message and "actstore index" in message
    assert "damaged" not in message and found["limits"] == [N_SAES, N_SAES]
