"""Every benchmark, one after the other, and one table of what was reached; exits with 1 where a floor was missed.

python benchmarks/all.py [--large]      what `make bench` and `make bench-large` run
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import workload
from measures import COLLECTED, read_measures, table

HERE = Path(__file__).resolve().parent
SCRIPTS = (
    ("overlap.py", "--tokens", "8000", "--rounds", "2"),
    ("one_core.py",),
    ("memory.py",),
    ("storage.py",),
    ("index.py", "--saes", "1", "4"),
    ("query.py",),
    ("gather.py",),
    ("lens.py", "--vocabulary", "8192", "--rounds", "9"),
)
LARGE = (
    ("index.py", "--firings", "10e6", "100e6", "--large"),
    ("query.py", "--firings", "100e6", "1e9"),
    ("lens.py",),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="the sizes that take long, and disk")
    asked = parser.parse_args()
    print(f"machine: {workload.machine()}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        collected = Path(temporary) / "measures.jsonl"
        collected.touch()
        failed = [script for script in (LARGE if asked.large else SCRIPTS) if not ran(script, collected)]
        measures = read_measures(collected)
    print(f"\n{table(measures)}")
    for script in failed:
        print(f"{' '.join(script)} ended with an error")
    return int(bool(failed) or any(one.verdict == "MISSED" for one in measures))


def ran(script: tuple[str, ...], collected: Path) -> bool:
    """Run one script; return whether it ended well."""
    print(f"\n== {' '.join(script)}", flush=True)
    started = time.monotonic()
    environment = {**os.environ, COLLECTED: str(collected)}
    done = subprocess.run([sys.executable, HERE / script[0], *script[1:]], env=environment, check=False)
    print(f"   {time.monotonic() - started:.0f} s", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
