"""Damaged shards are given up and made again by what made them, byte for byte; a damaged index from the arrays."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import failure, printed, run
from store_support import copy_of_finished, finished, hashes, index_content, truth
from tiny_world import RESIDUAL_SAE, extract

from actstore import maintenance
from actstore.api import Store
from actstore.index import read_catalog
from actstore.repair import repair
from actstore.store import StoreReader

SITE, FIRINGS = "arrays/sites/resid_post.1/c.2.0", f"firings/{RESIDUAL_SAE}/4.zip"


def flip(*paths: Path) -> None:
    for path in paths:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], dict[int, list[str]]]] = {
    "a changed byte": (lambda store: flip(store / SITE), {2: [SITE]}),
    "a file that is gone": (lambda store: (store / FIRINGS).unlink(), {4: [FIRINGS]}),
    "a file cut short": (lambda store: (store / SITE).write_bytes((store / SITE).read_bytes()[:-9]), {2: [SITE]}),
    "several shards": (
        lambda store: flip(store / SITE, store / FIRINGS, store / "arrays/predictions/ids/c.4.0"),
        {2: [SITE], 4: ["arrays/predictions/ids/c.4.0", FIRINGS]},
    ),
}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return copy_of_finished(tmp_path)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_shards_are_given_up_and_made_again_byte_for_byte(store: Path, name: str) -> None:
    damage, expected = DAMAGE[name]
    damage(store)
    assert not maintenance.verify(store).ok

    (given_up,) = repair(store).given_up

    assert {shard: sorted(files) for shard, files in given_up.shards.items()} == {
        shard: sorted(files) for shard, files in expected.items()
    }
    left = maintenance.verify(store)
    assert left.ok and not left.orphans, "what is left is whole, and of the shards that were given up nothing is"
    reader = StoreReader(store)
    assert sorted(reader.receipts[given_up.pass_id]) == [n for n in range(6) if n not in expected]
    made = extract(store)
    assert (made.n_shards_made, made.complete) == (len(expected), True)
    assert truth(store) == truth(finished()) and index_content(store) == index_content(finished())
    assert maintenance.verify(store).ok


def test_the_index_of_what_is_left_says_what_is_left(store: Path) -> None:
    flip(store / FIRINGS)
    repair(store)
    rows = StoreReader(store).shard_rows
    with Store(store) as opened:
        shards = opened.sql(f"SELECT DISTINCT row // {rows} AS shard FROM activations ORDER BY 1").numpy()["shard"]
        everything = opened.sql(f"SELECT DISTINCT row // {rows} AS shard FROM tokens ORDER BY 1").numpy()["shard"]
    assert shards.tolist() == [n for n in everything.tolist() if n != 4]


def test_a_whole_store_is_left_as_it_is(store: Path) -> None:
    before = hashes(store)
    mended = repair(store)
    assert mended.given_up == [] and mended.left.ok
    assert hashes(store) == before


def test_a_receipt_that_is_damaged_is_given_up_with_its_shard(store: Path) -> None:
    flip(store / SITE)
    (first,) = repair(store).given_up  # all others have receipts of their own now
    receipt = store / "passes" / first.pass_id / "receipts" / "5.json"
    flip(receipt)
    (second,) = repair(store).given_up
    assert second.shards == {5: (receipt.relative_to(store).as_posix(),)}
    assert extract(store).n_shards_made == 2
    assert truth(store) == truth(finished())


def test_repairing_goes_on_where_it_died(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(store / SITE)

    def die(path: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("actstore.store.repair.Path.unlink", die)
        with pytest.raises(KeyboardInterrupt):
            repair(store)
    assert not maintenance.verify(store).ok, "the damage is still seen"
    assert [one.shards for one in repair(store).given_up] == [{2: (SITE,)}]
    assert extract(store).complete and truth(store) == truth(finished())


INDEX_DAMAGE: dict[str, Callable[[Path], object]] = {
    "a part": lambda index: flip(next(index.glob("firings.*.duckdb"))),
    "a part that is gone": lambda index: next(index.glob("tokens.*.duckdb")).unlink(),
    "the catalog": lambda index: flip(index / read_catalog(index).name),
    "CURRENT": lambda index: flip(index / "CURRENT"),
    "an earlier catalog": lambda index: (index / "catalog-0.json").write_bytes(b"{}"),
}


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_a_damaged_index_is_made_anew(store: Path, name: str) -> None:
    INDEX_DAMAGE[name](store / "index")
    assert not maintenance.verify(store).ok
    mended = repair(store)
    assert mended.given_up == [] and mended.left.ok and not mended.left.orphans
    assert index_content(store) == index_content(finished())


def test_only_parts_that_are_damaged_are_made_anew(store: Path) -> None:
    before = {part.name for part in read_catalog(store / "index").parts}
    damaged = next((store / "index").glob("tokens.*.duckdb"))
    flip(damaged)
    repair(store)
    assert before - {part.name for part in read_catalog(store / "index").parts} == {damaged.name}


def test_indexing_makes_a_part_anew_whose_file_is_gone(store: Path) -> None:
    next((store / "index").glob("tokens.*.duckdb")).unlink()
    maintenance.index(store)
    assert maintenance.verify(store).ok and index_content(store) == index_content(finished())


def test_what_no_shard_holds_is_told_and_left(store: Path) -> None:
    kit = next((store / "kit").glob("*.zip"))
    shutil.copy(kit, kit.with_suffix(".copy"))  # a piece is a link into the cache: not to be changed there
    kit.unlink()
    kit.with_suffix(".copy").rename(kit)
    flip(kit)
    mended = repair(store)
    assert mended.given_up == [] and len(mended.left.faults) == 1 and kit.name in mended.left.faults[0]


def test_the_command_line_says_what_to_do(store: Path) -> None:
    flip(store / SITE)
    told = run("verify", store)
    assert told.exit_code == 1
    *_, verdict, next_step = told.stdout.splitlines()
    assert verdict.endswith(": 1 fault") and next_step == f"Next: actstore verify {store} --repair"
    said = printed("verify", store, "--repair")
    assert re.match(rf"given up: shard 2 of pass [0-9a-f]{{16}}, damaged in {re.escape(SITE)}\n", said)
    assert f"to make them again: actstore extract MODEL --into {store} --site resid_post.1" in said
    assert "all as it was written" in said


def test_where_the_layout_cannot_be_read_nothing_is_touched(store: Path) -> None:
    flip(store / SITE)
    flip(store / "layout.json")
    before = hashes(store)
    assert "layout.json" in failure("verify", store, "--repair")
    assert hashes(store) == before
