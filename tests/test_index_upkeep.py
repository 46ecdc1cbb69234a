"""Verification finds every changed byte; collection removes only what nothing names."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from index_support import HALF, FakeSource, hashes

from actstore.errors import CorruptStore
from actstore.index import (
    CURRENT,
    Catalog,
    build_index,
    find_orphans,
    gc_index,
    load_catalog,
    open_index,
    read_catalog,
    verify_index,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("built")
    source = FakeSource()
    source.saes = [HALF]
    source.extract(0, 3)
    build_index(source, directory)
    return directory


@pytest.fixture
def index(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "index"))


KINDS = ["core", "vocabulary", "documents", "tokens", "predictions", "firings", "reconstruction", "features", "lens"]


@pytest.mark.parametrize("pattern", [CURRENT, "catalog-*.json", *(f"{kind}.*" for kind in KINDS)])
def test_a_flipped_bit_anywhere_is_a_fault_of_that_file(index: Path, pattern: str) -> None:
    path = next(index.glob(pattern))
    data = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(data) * 8, 6):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << (place % 8)
        path.write_bytes(changed)
        assert any(path.name in fault for fault in verify_index(index)), f"bit {place}"
    path.write_bytes(data)
    assert verify_index(index) == []


@pytest.mark.parametrize("pattern", [CURRENT, "catalog-*.json", "tokens.*", "firings.*"])
@pytest.mark.parametrize("size", [None, 0, 100], ids=["missing", "empty", "truncated"])
def test_missing_and_truncated_files_are_faults(index: Path, pattern: str, size: int | None) -> None:
    path = next(index.glob(pattern))
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:size])
    assert any(path.name in fault for fault in verify_index(index))


def test_swapped_parts_are_faults(index: Path) -> None:
    one, other = next(index.glob("firings.*")), next(index.glob("features.*"))
    one.rename(index / "aside")
    other.rename(one)
    (index / "aside").rename(other)
    assert len(verify_index(index)) == 2


def test_an_earlier_catalog_put_back_under_the_current_name_is_a_fault(index: Path) -> None:
    source = FakeSource()
    source.saes = [HALF]
    source.extract(0, 3, 1)
    first = next(index.glob("catalog-*.json"))
    build_index(source, index)
    (index / read_catalog(index).name).write_bytes(first.read_bytes())
    assert any("is not the file that CURRENT names" in fault for fault in verify_index(index))


def test_no_index_is_no_fault(tmp_path: Path) -> None:
    assert verify_index(tmp_path) == [] and find_orphans(tmp_path) == [] and verify_index(tmp_path / "none") == []


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_opening_refuses_a_part_that_is_not_whole(index: Path, damage: str) -> None:
    path = next(index.glob("tokens.*"))
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(CorruptStore, match=path.name):
        open_index(read_catalog(index), lambda name: index / name)


def test_a_flipped_byte_is_never_read_as_a_value(index: Path) -> None:
    catalog = read_catalog(index)
    path = next(index.glob("predictions.*"))
    data = path.read_bytes()
    query = "SELECT sum(hash(row, target_id, target_logprob, entropy, top1_id, top1_prob)) FROM predictions"
    with open_index(catalog, lambda name: index / name, threads=1) as connection:
        intact = connection.sql(query).table
    refused = 0
    for place in np.random.default_rng(1).integers(0, len(data), 20):
        path.unlink()  # a new file each time: DuckDB knows open files by their inode
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            with open_index(catalog, lambda name: index / name, threads=1) as connection:
                assert connection.sql(query).table == intact
        except CorruptStore:
            refused += 1
    assert refused


def test_orphans_are_named_apart_from_faults_and_collected(index: Path) -> None:
    strays = ["firings.x.0-1.99.duckdb", "core.98.duckdb.partial", "catalog-97.json.ab.partial"]
    for name in strays:
        (index / name).write_bytes(b"x")
    spill = index / "core.98.duckdb.spill.partial"
    spill.mkdir()
    (spill / "block").write_bytes(b"x")
    before = {name: digest for name, digest in hashes(index).items() if name not in strays}
    assert verify_index(index) == []
    assert [path.name for path in find_orphans(index)] == sorted([*strays, spill.name])
    assert gc_index(index) == sorted([*strays, spill.name])
    assert hashes(index) == before and not spill.exists()


def test_collection_removes_a_link_and_not_what_it_leads_to(index: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_bytes(b"x")
    (index / "link").symlink_to(tmp_path / "elsewhere")
    assert gc_index(index) == ["link"] and not (index / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_a_name_that_only_resembles_a_catalog_is_an_orphan(index: Path) -> None:
    (index / "catalog-old.json").write_bytes(b"{}")
    assert verify_index(index) == [] and gc_index(index) == ["catalog-old.json"]


def test_collection_compares_and_removes_under_the_lock(index: Path) -> None:
    (index / "core.98.duckdb").write_bytes(b"x")
    seen: list[bool] = []

    @contextmanager
    def held() -> Iterator[None]:
        (index / "core.99.duckdb").write_bytes(b"x")
        seen.append((index / "core.98.duckdb").exists())
        yield
        seen.append((index / "core.98.duckdb").exists())

    assert gc_index(index, lock=held()) == ["core.98.duckdb", "core.99.duckdb"] and seen == [True, False]


@pytest.fixture(scope="module")
def three_builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Catalog]]:
    directory = tmp_path_factory.mktemp("three_builds")
    source = FakeSource()
    source.saes = [HALF]
    catalogs = []
    for shard in (0, 1, 2):
        source.extract(shard)
        catalogs.append(build_index(source, directory))
    return directory, catalogs


@pytest.mark.parametrize(("keep", "kept"), [(1, 1), (2, 2), (9, 3)])
def test_collection_keeps_what_recent_catalogs_name(
    three_builds: tuple[Path, list[Catalog]], tmp_path: Path, keep: int, kept: int
) -> None:
    directory, catalogs = Path(shutil.copytree(three_builds[0], tmp_path / "index")), three_builds[1]
    gc_index(directory, keep)
    for catalog in catalogs[-kept:]:
        assert (directory / catalog.name).exists()
        open_index(catalog, lambda name: directory / name, threads=1).close()
    assert len(list(directory.glob("catalog-*.json"))) == kept
    assert verify_index(directory) == []


def test_collection_stops_where_a_catalog_cannot_be_read(index: Path) -> None:
    next(index.glob("catalog-*.json")).write_bytes(b"{}")
    before = hashes(index)
    with pytest.raises(CorruptStore):
        gc_index(index)
    assert hashes(index) == before and find_orphans(index) == []


def test_names_are_never_given_twice(index: Path) -> None:
    source = FakeSource()
    source.saes = [HALF]
    source.extract(0, 3)
    catalog = read_catalog(index)
    used = {path.name for path in index.iterdir()}
    source.extract(1)
    second = build_index(source, index)
    gc_index(index)
    source.extract(2)
    third = build_index(source, index)
    fresh = {part.name for part in third.parts} - {part.name for part in second.parts}
    assert not fresh & used and catalog.next_number < second.next_number < third.next_number


def test_a_catalog_reads_from_bytes_alone(index: Path) -> None:
    files = {path.name: path.read_bytes() for path in index.iterdir()}

    def read(name: str) -> bytes:
        if name not in files:
            raise FileNotFoundError(name)
        return files[name]

    assert load_catalog(read) == read_catalog(index)
    del files[CURRENT]
    assert load_catalog(read).parts == ()
