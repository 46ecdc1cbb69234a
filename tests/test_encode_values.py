"""New coders over stored sites without the model: the same bits as extraction, and flips where sites were rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from encode_support import CODERS, NO_LENS, SITES, TOP, coders, copy_of_sites, encode, health, stored
from store_support import copy_of_finished, hashes
from tiny_world import RESIDUAL_SAE, extract, tiny_world

import actstore
from actstore import maintenance
from actstore.recipe import Recipe
from actstore.store import StoreReader

TABLES = ("activations", "features", "examples", "feature_logits", "reconstruction", "saes")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store whose coders were extracted, and one whose coders were encoded."""
    folder = tmp_path_factory.mktemp(request.param)
    extract(folder / "one.act", sites=SITES, saes=list(coders()), neurons_top=TOP, dtype=request.param, **NO_LENS)
    stored(folder / "two.act", dtype=request.param)
    encode(folder / "two.act", with_index=True)
    return folder / "one.act", folder / "two.act"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of a store with sites alone, to be changed."""
    return copy_of_sites(tmp_path)


# The same numbers


@pytest.mark.parametrize("home", ["firings", "arrays/reconstruction", "arrays/sites", "kit"])
def test_every_byte_is_that_of_extraction(pair: tuple[Path, Path], home: str) -> None:
    one, two = (hashes(store, home) for store in pair)
    assert one == two and len(one) >= 5


def test_every_coder_fires(pair: tuple[Path, Path]) -> None:
    reader = StoreReader(pair[1])
    n_firings = {sae: sum(len(reader.firings(sae, shard).features) for shard in (0, 1)) for sae in CODERS}
    assert min(n_firings.values()) > 50, n_firings


def test_sql_cannot_tell_them_apart(pair: tuple[Path, Path]) -> None:
    with actstore.open(pair[0]) as one, actstore.open(pair[1]) as two:
        for table in TABLES:
            columns = "* EXCLUDE (pass)" if table == "saes" else "*"
            ordered = f"SELECT {columns} FROM {table} ORDER BY ALL"
            assert one.sql(ordered).arrow().equals(two.sql(ordered).arrow()), table


def test_the_recipe_says_what_it_stands_on(pair: tuple[Path, Path]) -> None:
    reader = StoreReader(pair[1])
    (site_pass, encode_pass) = (Recipe.from_json(made.recipe) for made in reader.passes.values())
    assert {source.site: source.digest for source in encode_pass.sources} == dict.fromkeys(SITES, site_pass.digest)
    assert {source.dtype for source in encode_pass.sources} == {site_pass.compute_dtype}
    assert not site_pass.sources and "sources" not in site_pass.to_json()
    assert encode_pass.model == site_pass.model and encode_pass.corpus == site_pass.corpus
    assert maintenance.verify(pair[1]).ok


def test_nothing_can_differ_where_sites_are_stored_as_computed(pair: tuple[Path, Path]) -> None:
    checks = health(pair[1])
    for sae in CODERS:
        check = checks["sae_flips", sae]
        assert (check["value"], check["ok"]) == (0.0, True) and "as computed" in check["expected"]


def test_special_rows_and_bits_are_as_asked_for(copied: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"encode_special": True, "activation_bits": 23}
    residual = tiny_world().residual_sae
    encode(copied, [residual], **asked)
    extract(tmp_path / "one.act", sites=[], saes=[residual], with_index=False, **NO_LENS, **asked)
    assert hashes(copied, "firings") == hashes(tmp_path / "one.act", "firings")


# Rounded sites


def places(store: Path, sae: str, shard: int, width: int) -> npt.NDArray[np.int64]:
    one = StoreReader(store).firings(sae, shard)
    return np.array([row * width + int(feature) for row in range(one.n_rows) for feature in fired(one, row)])


def fired(firings: Any, row: int) -> Any:
    return firings.features[firings.indptr[row] : firings.indptr[row + 1]]


def test_flips_of_rounded_sites_are_measured_where_the_coder_was_extracted(tmp_path: Path) -> None:
    world, out = tiny_world(), tmp_path / "a.act"
    extract(out, storage_dtype="bfloat16", with_index=False, **NO_LENS)
    again = world.residual_sae.replace(RESIDUAL_SAE, "again", 1)
    encode(out, [again])
    was, now = (set(places(out, sae, 0, 300)) for sae in (RESIDUAL_SAE, "again"))
    check = health(out)["sae_flips", "again"]
    assert check["value"] == pytest.approx(1000 * len(was ^ now) / len(was)) and check["ok"] is None
    assert "with rounding: resid_post.1" in check["expected"] and RESIDUAL_SAE in check["expected"]
    assert 0 < len(was ^ now) < len(was) / 4, "the test would see nothing"


def test_flips_of_rounded_sites_are_not_proved_without_the_model(tmp_path: Path) -> None:
    out = stored(tmp_path / "a.act", storage_dtype="bfloat16", with_index=False)
    encode(out, [tiny_world().residual_sae])
    check = health(out)["sae_flips", RESIDUAL_SAE]
    assert (check["value"], check["ok"]) == (None, None) and "not measured" in check["expected"]


def test_the_same_coder_by_another_name_does_not_flip(tmp_path: Path) -> None:
    out = copy_of_finished(tmp_path)
    encode(out, [tiny_world().residual_sae.replace(RESIDUAL_SAE, "again", 1)])
    check = health(out)["sae_flips", "again"]
    assert (check["value"], check["ok"]) == (0.0, True) and RESIDUAL_SAE in check["expected"]
