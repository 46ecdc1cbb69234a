"""Runs in processes of their own that stop between the beginning of a pass and their first claim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from encode_support import encode
from process_support import processes
from tiny_world import RESIDUAL_SAE, TinyWorld, extract, tiny_world

from actstore.maintenance import save_lens_and_index

__all__ = ["RUNS", "begun", "goes_on"]

SECONDS = 60.0  # more than any process here needs


def _extracted(store: Path, world: TinyWorld, **options: Any) -> Any:
    asked: dict[str, Any] = {"sites": [], "lens_k": 0, "lens_sites": [], "into": True, "with_index": False}
    return extract(store, world, dataset=None, saes=[world.residual_sae], **asked, **options)


def _encoded(store: Path, world: TinyWorld, **options: Any) -> Any:
    return encode(store, [world.residual_sae], **options)


def _lens_saved(store: Path, world: TinyWorld, **options: Any) -> Any:
    return save_lens_and_index(store, sites=("resid_post.1",), k=3, device="cpu", with_index=False, **options)


RUNS: dict[str, tuple[Callable[..., Any], str]] = {
    "extract": (_extracted, f"firings/{RESIDUAL_SAE}"),
    "encode": (_encoded, f"firings/{RESIDUAL_SAE}"),
    "save-lens": (_lens_saved, "lens/logit/resid_post.1"),
}


def _pause_before_the_first_claim(there: Connection, kind: str, store: Path, world: TinyWorld) -> None:
    """Run, in a process of its own: say when the pass has begun and the lock is free, then wait."""

    def report(_doing: str, done: float, _total: float | None, unit: str) -> None:
        if unit == "shards" and not done:
            there.send("begun")
            there.recv()

    there.send(RUNS[kind][0](store, world, report=report).complete)


@contextmanager
def begun(kind: str, store: Path) -> Iterator[tuple[Any, Connection]]:
    """Start a run in a process; give it and the line to it as it stands between the lock and its first claim."""
    here, there = processes().Pipe()
    process = processes().Process(target=_pause_before_the_first_claim, args=(there, kind, store, tiny_world()))
    process.start()
    there.close()
    try:
        assert here.poll(SECONDS) and here.recv() == "begun"
        yield process, here
    finally:
        process.kill()
        process.join()


def goes_on(line: Connection) -> bool:
    """Let a run go on; return whether it said that its pass is complete."""
    line.send("go on")
    assert line.poll(SECONDS)
    return bool(line.recv())
