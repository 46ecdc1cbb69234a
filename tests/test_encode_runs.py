"""Encoding stored sites: resumed, shared, extended after an append, indexed, and left after a drop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from encode_support import NO_LENS, SITES, coders, copy_of_sites, encode, start_encoding, stored
from store_support import Stopped, extract_some, hashes, truth
from tiny_world import RESIDUAL_SAE, extract, tiny_world

import actstore
from actstore import maintenance
from actstore.errors import InvalidInput, UnknownName
from actstore.recipe import Recipe
from actstore.store import StoreReader


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of a store with sites alone, to be changed."""
    return copy_of_sites(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that two coders were encoded into, undisturbed."""
    out = copy_of_sites(tmp_path_factory.mktemp("whole"))
    encode(out, coders()[:2])
    return out


def test_the_same_command_makes_nothing_twice(copied: Path) -> None:
    first, again = encode(copied), encode(copied)
    assert first.complete and first.n_shards_made == StoreReader(copied).layout.n_shards
    assert again.complete and again.n_shards_made == 0 and again.pass_id == first.pass_id


def test_a_stopped_run_resumes_to_the_same_bytes(copied: Path, whole: Path) -> None:
    def report(doing: str, done: float, _total: float | None, _unit: str) -> None:
        if doing == "encoding" and done >= 2:
            raise Stopped

    with pytest.raises(Stopped):
        encode(copied, coders()[:2], report=report)
    assert encode(copied, coders()[:2]).n_shards_made == StoreReader(copied).layout.n_shards - 2
    assert truth(copied) == truth(whole) and maintenance.verify(copied).ok


@pytest.mark.slow
@pytest.mark.parametrize("dies_at", [9, 31, 60])
def test_a_killed_run_resumes_to_the_same_bytes(copied: Path, whole: Path, dies_at: int) -> None:
    killed = start_encoding(copied, coders()[:2], dies_at=dies_at)
    killed.join()
    assert killed.exitcode == -9
    assert encode(copied, coders()[:2]).complete
    assert truth(copied) == truth(whole) and maintenance.verify(copied).ok


@pytest.mark.slow
def test_two_processes_share_the_work(copied: Path, whole: Path) -> None:
    both = [start_encoding(copied, coders()[:2]) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert encode(copied, coders()[:2]).n_shards_made == 0
    assert truth(copied) == truth(whole) and maintenance.verify(copied).ok


def test_a_site_that_is_not_stored_everywhere_is_encoded_as_far_as_it_goes(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.act"
    extract_some(out, 2, sites=SITES, saes=[], with_index=False, **NO_LENS)
    some = encode(out, coders()[:2])
    assert (some.n_shards_made, some.complete) == (2, False)
    stored(out, with_index=False)
    assert encode(out, coders()[:2]).complete
    assert truth(out) == truth(whole)


def test_appended_documents_are_encoded_by_the_same_command(copied: Path) -> None:
    first = encode(copied, [tiny_world().residual_sae])
    appended = stored_again(copied)
    assert first.pass_id in appended.unfinished
    again = encode(copied, [tiny_world().residual_sae])
    assert again.complete and again.pass_id == first.pass_id and again.n_shards_made > 0
    assert not again.unfinished and maintenance.verify(copied).ok


def stored_again(out: Path) -> Any:
    return extract(out, sites=SITES, saes=[], append=str(tiny_world().more), **NO_LENS)


def test_the_index_gets_parts_and_loses_none(copied: Path) -> None:
    before = hashes(copied, "index")
    encode(copied, with_index=True)
    after = hashes(copied, "index")
    assert {name for name in before if after.get(name) != before[name]} == {"index/CURRENT"}
    added = {name.split("/")[1].split(".")[0] for name in after.keys() - before.keys() if name.endswith(".duckdb")}
    assert added == {"core", "firings", "features", "reconstruction"}


def test_no_index_leaves_the_index(copied: Path) -> None:
    before = hashes(copied, "index")
    encode(copied, coders()[:1], with_index=False)
    assert hashes(copied, "index") == before


def test_firings_outlive_the_site_that_they_were_made_from(copied: Path) -> None:
    encode(copied, [tiny_world().residual_sae], with_index=True)
    firings = hashes(copied, "firings")
    maintenance.drop(copied, "sites/resid_post.1")
    with actstore.open(copied) as store:
        assert hashes(copied, "firings") == firings and store.saes == [RESIDUAL_SAE]
        assert store.sql("SELECT count(*) FROM activations").scalar() > 0
        assert json.loads(store.sql("SELECT recipe FROM passes WHERE recipe LIKE '%sources%'").scalar())["sources"]
    assert maintenance.verify(copied).ok
    with pytest.raises(UnknownName, match=r"no stored site 'resid_post\.1'"):
        encode(copied, [tiny_world().residual_sae])


def test_what_was_dropped_is_not_called_complete(copied: Path) -> None:
    encode(copied)
    maintenance.drop(copied, RESIDUAL_SAE)
    with pytest.raises(InvalidInput, match=f"firings/{RESIDUAL_SAE} was made by this command and dropped"):
        encode(copied)
    assert encode(copied, [tiny_world().residual_sae]).complete


def test_sites_of_two_passes_are_two_sources(tmp_path: Path) -> None:
    out = stored(tmp_path / "a.act", sites=["ln2.1"], with_index=False)
    stored(out, sites=["mlp_out.1"], dataset=None, into=True, predictions=False, with_index=False)
    outcome = encode(out, [coders()[3]])
    reader = StoreReader(out)
    recipe = Recipe.from_json(reader.passes[outcome.pass_id].recipe)
    owners = {site: reader.passes[reader.layout.artifacts[f"sites/{site}"]] for site in ("ln2.1", "mlp_out.1")}
    assert {one.site: one.digest for one in recipe.sources} == {
        site: made.recipe_digest for site, made in owners.items()
    }
    assert len({one.digest for one in recipe.sources}) == 2
