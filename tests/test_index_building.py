"""Building: parts are added, never changed; what the parts say never depends on how they came about."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pytest
from index_support import HALF, LENS, ORDERED, WIDE, FakeSource, content, hashes

from actstore.errors import CorruptStore, NoSpace, StoreBusy
from actstore.index import (
    MAX_PARTS,
    Catalog,
    build_index,
    compact,
    compaction,
    feature_parts,
    find_orphans,
    firing_parts,
    gc_index,
    open_index,
    read_catalog,
    verify_index,
)
from actstore.index import catalog as catalog_module
from actstore.index.parts import Workshop
from actstore.sealed import write_durably

ROUNDED_FEATURES = """SELECT * REPLACE (round(mean_activation, 9) AS mean_activation, round(std_activation, 9) AS
    std_activation) FROM features ORDER BY ALL"""


@pytest.fixture
def source() -> FakeSource:
    made = FakeSource()
    made.saes = [HALF]
    made.extract(0, 3)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeSource, Path]:
    """All shards in one build, within the usual bounds; nobody changes either."""
    directory = tmp_path_factory.mktemp("whole")
    made = FakeSource()
    made.saes = [HALF]
    made.extract(0, 1, 2, 3, 4)
    build_index(made, directory)
    return made, directory


@pytest.fixture(scope="module")
def five_builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeSource, Path]:
    """An index that was brought up to date after every shard; its last firings part holds floats."""
    directory = tmp_path_factory.mktemp("five_builds")
    source = FakeSource()
    source.saes = [HALF]
    for shard in range(5):
        source.extract(shard)
        if shard == 4:
            source.firings_of[HALF, shard].activations[0] = np.float32(1e-9)
        build_index(source, directory)
    return source, directory


@pytest.fixture
def many_parts(five_builds: tuple[FakeSource, Path], tmp_path: Path) -> tuple[FakeSource, Path]:
    source, directory = five_builds
    return copy.deepcopy(source), Path(shutil.copytree(directory, tmp_path / "index"))


def test_nothing_new_is_no_new_catalog(source: FakeSource, tmp_path: Path) -> None:
    first = build_index(source, tmp_path)
    before = hashes(tmp_path)
    assert build_index(source, tmp_path) == first
    assert hashes(tmp_path) == before


def test_indexing_while_extraction_runs_adds_parts_and_changes_no_file(source: FakeSource, tmp_path: Path) -> None:
    first = build_index(source, tmp_path)
    before = hashes(tmp_path)
    source.extract(1, 4)
    second = build_index(source, tmp_path)
    after = hashes(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {"CURRENT"}
    assert {part.name for part in first.select("firings")} < {part.name for part in second.select("firings")}
    assert [sorted(part.shards) for part in second.select("firings", HALF)] == [[0, 3], [1, 4]]
    assert second.number > first.number and second.next_number > first.next_number


def test_content_does_not_depend_on_the_order_of_building(source: FakeSource, tmp_path: Path) -> None:
    build_index(source, tmp_path / "stepwise")
    source.saes = [HALF, WIDE]
    source.extract(4, 1)
    source.compute_logits(WIDE)
    build_index(source, tmp_path / "stepwise")
    build_index(source, tmp_path / "at_once")
    assert content(tmp_path / "stepwise") == content(tmp_path / "at_once")


def test_a_new_segment_and_a_new_sae_keep_every_earlier_part(source: FakeSource, tmp_path: Path) -> None:
    first = build_index(source, tmp_path)
    source.saes = [HALF, WIDE]
    source.add_segment(2)
    second = build_index(source, tmp_path)
    gone = {part.name for part in first.parts} - {part.name for part in second.parts}
    assert [name.split(".")[0] for name in gone] == ["core"]
    assert [part.subject for part in second.select("documents")] == ["0", "1", "2"]


def test_shards_with_another_receipt_are_indexed_again(source: FakeSource, tmp_path: Path) -> None:
    build_index(source, tmp_path)
    source.encode(HALF, 3, receipt="again")
    renewed = build_index(source, tmp_path)
    build_index(source, tmp_path / "fresh")
    assert content(tmp_path) == content(tmp_path / "fresh")
    assert [sorted(part.shards) for part in renewed.select("firings", HALF)] == [[0, 3]]


def test_a_dropped_sae_leaves_the_index(source: FakeSource, tmp_path: Path) -> None:
    source.saes = [HALF, WIDE]
    build_index(source, tmp_path)
    source.saes = [WIDE]
    assert {part.subject for part in build_index(source, tmp_path).select("firings")} == {WIDE}


def test_feature_logits_computed_later_renew_only_the_features(source: FakeSource, tmp_path: Path) -> None:
    first = build_index(source, tmp_path)
    source.compute_logits(HALF)
    second = build_index(source, tmp_path)
    kept = {part.name for part in first.parts}
    assert [part.kind for part in second.parts if part.name not in kept] == ["features"]


@pytest.mark.parametrize("max_firings", [1, 700, 1500], ids=["shard by shard", "some together", "all but one"])
def test_ranges_that_fit_in_memory_say_the_same(
    whole: tuple[FakeSource, Path], tmp_path: Path, max_firings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, directory = whole
    monkeypatch.setattr(firing_parts, "MAX_FIRINGS", max_firings)
    split = build_index(source, tmp_path / "split")
    assert len(split.select("firings", HALF)) > 1
    assert content(tmp_path / "split") == content(directory)


@pytest.mark.parametrize("block", [1, 40, 200], ids=["every feature too large", "some too large", "several blocks"])
def test_feature_blocks_of_any_size_say_the_same(
    whole: tuple[FakeSource, Path], tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, directory = whole
    monkeypatch.setattr(feature_parts, "MAX_BLOCK_FIRINGS", block)
    build_index(source, tmp_path / "split")
    monkeypatch.setitem(ORDERED, "features", ROUNDED_FEATURES)  # sums are added in another order
    assert content(tmp_path / "split") == content(directory)


@pytest.mark.parametrize("block", [1, 40, 200], ids=["every feature too large", "some too large", "several blocks"])
def test_features_read_back_from_several_parts_say_the_same(
    whole: tuple[FakeSource, Path], tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, directory = whole
    monkeypatch.setattr(firing_parts, "MAX_FIRINGS", 700)
    monkeypatch.setattr(feature_parts, "MAX_BLOCK_FIRINGS", block)
    split = build_index(source, tmp_path / "split")
    assert len(split.select("firings", HALF)) > 1
    monkeypatch.setitem(ORDERED, "features", ROUNDED_FEATURES)  # sums are added in another order
    assert content(tmp_path / "split") == content(directory)


def test_little_memory_makes_more_parts_with_the_same_content(whole: tuple[FakeSource, Path], tmp_path: Path) -> None:
    source, directory = whole
    made = build_index(source, tmp_path / "small", memory_bytes=20_000)
    assert len(made.select("firings", HALF)) > 1
    made_whole = build_index(source, tmp_path / "medium", memory_bytes=200_000)
    assert len(made_whole.select("firings", HALF)) == 1
    assert content(tmp_path / "small") == content(tmp_path / "medium") == content(directory)


@pytest.mark.parametrize("float_shard", [None, 5], ids=["halves", "one shard of floats"])
def test_long_runs_are_stored_as_runs_and_read_back_exactly(tmp_path: Path, float_shard: int | None) -> None:
    source = FakeSource((12,))
    source.saes = [HALF]
    for tokens in source.tokens.values():
        tokens[:, 5] = 0
    source.extract(*range(12))
    if float_shard is not None:
        source.firings_of[HALF, float_shard].activations[3] = np.float32(0.1)
    (part,) = build_index(source, tmp_path).select("firings", HALF)
    with duckdb.connect(str(tmp_path / part.name), read_only=True) as connection:
        query = "FROM pragma_storage_info('firings') SELECT column_name, compression WHERE segment_type <> 'VALIDITY'"
        compression = dict(connection.sql(query).fetchall())
    assert compression["feature"] == "RLE" and compression["row"] == "BitPacking"
    assert compression["plain"] in ("RLE", "Constant")
    with open_index(read_catalog(tmp_path), lambda name: tmp_path / name, threads=1) as connection:
        found = connection.sql("SELECT feature, row, activation FROM activations").table.to_pylist()
    expected = [(feature, row, activation) for feature, row, activation, _ in source.all_firings(HALF)]
    assert [tuple(one.values()) for one in found] == expected


def test_compaction_leaves_at_most_four_parts_with_the_same_content(many_parts: tuple[FakeSource, Path]) -> None:
    source, directory = many_parts
    before, said = read_catalog(directory), content(directory)
    after = compact(directory)
    assert [len(before.select(kind)) for kind in ("firings", "predictions", "lens", "tokens")] == [5, 5, 5, 1]
    assert [len(after.select(kind)) for kind in ("firings", "predictions", "lens", "tokens")] == [MAX_PARTS] * 3 + [1]
    assert content(directory) == said and content(directory, before) == said
    assert verify_index(directory) == []
    assert build_index(source, directory) == after, "compacted parts still cover their receipts"


@pytest.mark.parametrize("block", [1, 40, 1_000_000], ids=["every feature too large", "some too large", "one block"])
def test_compacted_firings_are_ordered_by_feature_and_row(
    many_parts: tuple[FakeSource, Path], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory = many_parts
    monkeypatch.setattr(feature_parts, "MAX_BLOCK_FIRINGS", block)
    said = content(directory)
    (joined,) = [part for part in compact(directory).select("firings", HALF) if len(part.covers) > 1]
    with open_index(Catalog(1, (joined,), 2), lambda name: directory / name, threads=1) as connection:
        table = connection.sql("SELECT feature, row FROM activations").table
    feature, row = (column.to_numpy() for column in table.columns)
    assert len(row) == joined.n_rows
    assert np.all((np.diff(feature) > 0) | ((np.diff(feature) == 0) & (np.diff(row) > 0)))
    assert content(directory) == said


def test_parts_of_halves_and_floats_join_as_floats(
    many_parts: tuple[FakeSource, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory = many_parts
    said = content(directory)
    monkeypatch.setattr(compaction, "MAX_PARTS", 1)
    (joined,) = compact(directory).select("firings")
    assert [part.facts["activation"] for part in read_catalog(directory).select("firings")] == ["float"]
    assert content(directory) == said and len(joined.covers) == 5


def test_building_with_compaction_is_one_step_and_leaves_no_orphans(
    many_parts: tuple[FakeSource, Path], tmp_path: Path
) -> None:
    source, directory = many_parts
    source.add_segment(1)
    source.extract(5)
    earlier = {path.name for path in directory.iterdir()}
    catalog = build_index(source, directory, compact=True)
    build_index(source, tmp_path / "fresh")
    assert len(catalog.select("firings", HALF)) == MAX_PARTS
    assert content(directory) == content(tmp_path / "fresh")
    assert {path.name for path in find_orphans(directory) if path.suffix == ".duckdb"} <= earlier


def test_the_loser_of_two_builds_gets_an_error_and_leaves_nothing(source: FakeSource, tmp_path: Path) -> None:
    build_index(source, tmp_path)
    source.extract(1)

    @contextmanager
    def someone_else_first() -> Iterator[None]:
        build_index(source, tmp_path)
        yield

    with pytest.raises(StoreBusy, match="another process changed it"):
        build_index(source, tmp_path, lock=someone_else_first())
    assert verify_index(tmp_path) == []
    assert {path.name for path in tmp_path.glob("*.duckdb")} >= {part.name for part in read_catalog(tmp_path).parts}
    gc_index(tmp_path)
    assert len(list(tmp_path.glob("firings.half-sae.1-2.*"))) == 1


def test_parts_removed_while_building_are_noticed(source: FakeSource, tmp_path: Path) -> None:
    @contextmanager
    def collected_first() -> Iterator[None]:
        gc_index(tmp_path)
        yield

    with pytest.raises(StoreBusy, match="was removed"):
        build_index(source, tmp_path, lock=collected_first())
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_leaves_no_files_and_keeps_the_index(source: FakeSource, tmp_path: Path) -> None:
    build_index(source, tmp_path)
    before = hashes(tmp_path)
    source.extract(1)
    source.firings_of[HALF, 1].features[-1] = 250
    with pytest.raises(CorruptStore, match="feature 250 of 40"):
        build_index(source, tmp_path)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("step", [1, 2], ids=["before the catalog", "before CURRENT"])
def test_a_build_killed_while_publishing_changes_nothing(
    source: FakeSource, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(source, tmp_path)
    said = content(tmp_path)
    source.extract(1)
    calls: list[Path] = []

    def killed(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == step:
            raise KeyboardInterrupt
        write_durably(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(catalog_module, "write_durably", killed)
        patched.setattr(Workshop, "discard", lambda *_: None)  # a killed process tidies nothing
        with pytest.raises(KeyboardInterrupt):
            build_index(source, tmp_path)
    assert verify_index(tmp_path) == [] and content(tmp_path) == said
    build_index(source, tmp_path)
    gc_index(tmp_path)
    build_index(source, tmp_path / "fresh")
    assert verify_index(tmp_path) == [] and content(tmp_path) == content(tmp_path / "fresh")


def test_firings_on_filler_rows_are_refused(source: FakeSource, tmp_path: Path) -> None:
    source.firings_of[HALF, 0].indptr[-1:] += 1
    firings = source.firings_of[HALF, 0]
    object.__setattr__(firings, "features", np.append(firings.features, 0).astype(np.uint8))
    object.__setattr__(firings, "activations", np.append(firings.activations, 1).astype(np.float32))
    with pytest.raises(CorruptStore, match="outside its 48 rows in use"):
        build_index(source, tmp_path)


def test_a_full_disk_is_said(source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise duckdb.IOException("IO Error: Could not write file: No space left on device")

    monkeypatch.setattr(feature_parts, "_append_block", full)
    with pytest.raises(NoSpace, match="disk is full"):
        build_index(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_is_asked_once_for_each_artifact(
    source: FakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    done = source.done

    def counted(artifact: str) -> Mapping[int, str]:
        asked.append(artifact)
        return done(artifact)

    monkeypatch.setattr(source, "done", counted)
    build_index(source, tmp_path)
    assert sorted(asked) == ["corpus/tokens", f"firings/{HALF}", f"lens/{'/'.join(LENS)}", "predictions"]


def test_progress_counts_shards(source: FakeSource, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    build_index(source, tmp_path, progress=lambda *event: said.append(event))
    assert (f"firings {HALF}", 2, 2) in said and ("tokens", 5, 5) in said
