"""Claims of other containers: with one host name and PID namespaces of their own, numbers of processes say nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from actstore.store.claims import STALE_SECONDS, claim

CLAIMING = """
import sys
from pathlib import Path
from actstore.store.claims import claim
held = claim(Path(sys.argv[1]), Path(sys.argv[2]))
if held is None:
    print("taken", flush=True)
else:
    with held:
        print("held", flush=True)
        sys.stdin.read()
"""
CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "claims/pass/7.json"


def claiming(path: Path, root: Path, *before: str) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", CLAIMING, str(path), str(root)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def has_containers() -> bool:
    try:
        return subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["the first", "the second"])
def test_a_living_claim_is_respected_across_pid_namespaces(tmp_path: Path, path: Path, inside: str) -> None:
    if not has_containers():
        pytest.skip("unshare cannot make a PID namespace here")
    first, second = (CONTAINER, []) if inside == "the first" else ([], CONTAINER)
    with claiming(path, tmp_path, *first) as holder:
        assert said(holder) == "held"
        with claiming(path, tmp_path, *second) as other:
            assert said(other) == "taken"
        holder.communicate()
    assert not path.exists(), "it was its holder's to the end"


def write_claim(path: Path, *, age_seconds: float, **changes: Any) -> None:
    """Write the claim of a process that is gone, as far as this namespace knows."""
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid, "started": "1"} | changes))
    os.utime(path, (time.time() - age_seconds,) * 2)


@pytest.mark.parametrize(
    ("age_seconds", "given"),
    [(0.0, False), (STALE_SECONDS - 10, False), (STALE_SECONDS + 10, True)],
    ids=["fresh", "quiet", "stale"],
)
def test_the_claim_of_another_namespace_counts_while_it_is_touched(
    tmp_path: Path, path: Path, age_seconds: float, given: bool
) -> None:
    write_claim(path, age_seconds=age_seconds, namespace="pid:[1]")

    assert (claim(path, tmp_path) is not None) == given


def test_a_claim_that_says_no_namespace_is_of_this_one(tmp_path: Path, path: Path) -> None:
    """Claims of releases before said none."""
    write_claim(path, age_seconds=0.0)

    assert claim(path, tmp_path) is not None


def test_a_claim_says_its_namespace(tmp_path: Path, path: Path) -> None:
    held = claim(path, tmp_path)
    assert held is not None
    with held:
        assert json.loads(path.read_bytes())["namespace"] == str(Path("/proc/self/ns/pid").readlink())
