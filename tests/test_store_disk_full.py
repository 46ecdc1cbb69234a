"""A full disk: one clean error, nothing half-made in sight, and the same store once there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_support import extract_limited
from store_support import finished, truth
from tiny_world import extract

from actstore import maintenance
from actstore.errors import NoSpace
from actstore.sealed import PARTIAL_SUFFIX
from actstore.store import Journal, StoreReader
from actstore.store.claims import claim

PAGE = 4096
ENOUGH = 64 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own in memory; its size is set by `resize`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ENOUGH}", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def resize(disk: Path, n_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={n_bytes}", disk], check=True)


def used(disk: Path) -> int:
    fields = subprocess.run(["df", "--output=used", "-B1", disk], check=True, capture_output=True, text=True)
    return int(fields.stdout.splitlines()[1])


def half_made(store: Path) -> list[Path]:
    return list(store.rglob(f"*{PARTIAL_SUFFIX}"))


@pytest.mark.parametrize("share", [0.02, 0.15, 0.4, 0.6, 0.8, 0.97])
def test_an_extraction_that_fills_the_disk_says_so_and_resumes(small_disk: Path, share: float) -> None:
    extract(small_disk / "measured", with_index=False)
    n_bytes = used(small_disk)
    subprocess.run(["rm", "-r", small_disk / "measured"], check=True)
    resize(small_disk, int(share * n_bytes) // PAGE * PAGE)
    store = small_disk / "s.act"

    with pytest.raises(NoSpace, match=r"disk is full.*Next: free space and run the same command again"):
        extract(store, force=True, with_index=False)

    assert half_made(store) == []
    if (store / "store.json").exists():
        assert maintenance.verify(store).faults == []
        n_kept = [len(receipts) for receipts in StoreReader(store).receipts.values()]
    else:
        n_kept = []
    resize(small_disk, ENOUGH)
    outcome = extract(store, with_index=False)
    assert outcome.n_shards_made == StoreReader(store).layout.n_shards - sum(n_kept)
    assert truth(store) == truth(finished())
    assert maintenance.verify(store).faults == []


def test_an_index_that_fills_the_disk_says_so_and_is_built_later(small_disk: Path) -> None:
    store = small_disk / "s.act"
    extract(store, with_index=False)
    resize(small_disk, used(small_disk) + 300 * PAGE)

    with pytest.raises(NoSpace, match="free space"):
        maintenance.index(store)

    assert not (store / "index/CURRENT").exists()
    resize(small_disk, ENOUGH)
    maintenance.index(store)
    maintenance.collect_garbage(store)
    assert maintenance.verify(store).faults == []


def test_small_writes_say_so_too(small_disk: Path) -> None:
    journal = Journal(small_disk)
    resize(small_disk, used(small_disk) + PAGE)
    (small_disk / "filler").write_bytes(b"x" * PAGE)
    with pytest.raises(NoSpace):
        journal.write("event")
    with pytest.raises(NoSpace):
        claim(small_disk / "claims/pass/1.json", small_disk)

    assert half_made(small_disk) == []


# Where nothing can be mounted, a limit on the size of a file does as much


def test_files_that_may_not_grow_are_a_full_disk(tmp_path: Path) -> None:
    kind, message = extract_limited(tmp_path / "s.act", n_shards=2, file_bytes=1000)

    assert kind == "NoSpace", message
    assert "every finished shard is kept" in message
    assert half_made(tmp_path / "s.act") == []
    assert maintenance.verify(tmp_path / "s.act").faults == []
    n_kept = sum(len(receipts) for receipts in StoreReader(tmp_path / "s.act").receipts.values())
    assert n_kept == 2
    extract(tmp_path / "s.act", with_index=False)
    assert truth(tmp_path / "s.act") == truth(finished())
