"""One core only: writing a shard beside the next one's computing must not take longer than writing it afterwards.

python benchmarks/one_core.py [--tokens 6000]

The same seeded extraction of all residual streams as in overlap.py, the process kept on one core; the two ways take
turns, and what each takes at best counts. What they store is compared.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
import workload
from measures import Measure, show
from overlap import N_LAYERS, extracted, ragged_documents, seeded_model
from transformers import Gemma2ForCausalLM

from actstore.blocks import ShardBlock
from actstore.extraction import work
from actstore.extraction.pipeline import Committer

TURNS = 3


class Afterwards(Committer):
    """Writes a shard before the next one is begun."""

    def commit(self, finish: Callable[[], ShardBlock], claim: ExitStack) -> None:
        super().commit(finish, claim)
        self.wait()


def seconds_of(committer: type[Committer], home: Path, causal_lm: Gemma2ForCausalLM, documents: list[str]) -> float:
    with patch.object(work, "Committer", committer):
        return extracted(home, causal_lm, documents, sites=["resid_post.*"])


def digests_of_shards(store: Path) -> dict[str, str]:
    """Return the SHA-256 of every shard of the stored sites, by its path."""
    paths = (store / "arrays" / "sites").glob("*/c.*")
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=6_000)
    asked = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before any thread is made
    torch.set_num_threads(1)
    print(f"machine: {workload.machine()}, kept on one of them")
    documents, causal_lm = ragged_documents(asked.tokens), seeded_model()
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        home = Path(temporary)
        extracted(home / "warm", causal_lm, documents, sites=["resid_post.0"])
        beside, afterwards = [], []
        for turn in range(TURNS):
            beside.append(seconds_of(Committer, home / f"beside {turn}", causal_lm, documents))
            afterwards.append(seconds_of(Afterwards, home / f"afterwards {turn}", causal_lm, documents))
        one, other = (digests_of_shards(home / f"{way} 0") for way in ("beside", "afterwards"))
        assert one == other and len(one) >= N_LAYERS, "both ways store the same"
    ratio = min(beside) / min(afterwards)
    show([Measure("one core: writing beside the model / after it", ratio, 1.03, 1.0, less=True)])


if __name__ == "__main__":
    main()
