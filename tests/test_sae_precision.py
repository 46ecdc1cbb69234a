"""`--sae-precision screen`: a store's firings are those of exact arithmetic, now or later; it is in the recipe."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from encode_support import coders, encode
from store_support import hashes
from tiny_world import RESIDUAL_SAE, extract, tiny_world

from actstore.blocks import FLAG_SPECIAL, TokenShard
from actstore.cli import main
from actstore.errors import InvalidInput, RecipeMismatch
from actstore.recipe import Recipe
from actstore.store import StoreReader

NO_LENS: dict[str, Any] = {"lens_k": 0, "lens_sites": [], "with_index": False}
SCREEN: dict[str, Any] = {"sae_precision": "screen", **NO_LENS}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def screened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp(request.param) / "screened.act"
    extract(out, dtype=request.param, **SCREEN)
    return out


def recipes(store: Path) -> list[Mapping[str, Any]]:
    return [one.recipe for one in StoreReader(store).passes.values()]


def test_what_is_stored_is_what_the_equation_says_in_float64(screened: Path) -> None:
    reader = StoreReader(screened)
    weights = np.load(tiny_world().folder / "residual" / "params.npz")
    n_firings = 0
    for shard in range(reader.layout.n_shards):
        used = int(reader.rows_used[shard])
        first = shard * reader.shard_rows
        rows = np.asarray(reader.array("sites/resid_post.1")[first : first + used]).astype(np.float64)
        before = rows @ weights["W_enc"].astype(np.float64) + weights["b_enc"]
        is_special = (TokenShard(shard, reader.tokens(shard)).column("flags")[:used] & FLAG_SPECIAL) != 0
        expected = (before > weights["threshold"]) & ~is_special[:, None]
        firings = reader.firings(RESIDUAL_SAE, shard)
        found = np.zeros_like(expected)
        found[firings.rows(), firings.features.astype(int)] = True
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(firings.activations, before[expected], rtol=2.0**-10)
        n_firings += len(firings.features)
    assert n_firings > 100


def test_encoding_later_gives_the_very_bytes(screened: Path, tmp_path: Path) -> None:
    dtype = Recipe.from_json(recipes(screened)[0]).compute_dtype
    later = tmp_path / "later.act"
    extract(later, saes=[], dtype=dtype, **NO_LENS)
    encode(later, [tiny_world().residual_sae], sae_precision="screen")
    for home in ("firings", "arrays/reconstruction"):
        one, other = hashes(screened, home), hashes(later, home)
        assert one == other and len(one) >= 5


def test_flips_are_measured_only_against_the_same_precision(screened: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(screened, tmp_path / "copy.act"))
    for sae, precision in (("same", "screen"), ("other", "float32")):
        encode(store, [tiny_world().residual_sae.replace(RESIDUAL_SAE, sae, 1)], sae_precision=precision)
    checks = {row["subject"]: row for row in StoreReader(store).tables()["health"] if row["name"] == "sae_flips"}
    assert RESIDUAL_SAE in checks["same"]["expected"] and RESIDUAL_SAE not in checks["other"]["expected"]
    assert checks["same"]["ok"] and checks["other"]["ok"]


def test_it_is_in_the_recipe_and_the_default_says_nothing(screened: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.act"
    dtype = Recipe.from_json(recipes(screened)[0]).compute_dtype
    extract(plain, dtype=dtype, **NO_LENS)
    (one,), (other,) = recipes(screened), recipes(plain)
    assert one == {**other, "sae_precision": "screen"} and "sae_precision" not in other
    assert Recipe.from_json(one).digest != Recipe.from_json(other).digest
    with pytest.raises(RecipeMismatch, match="sae_precision"):
        extract(screened, dtype=dtype, **NO_LENS)


def test_neurons_alone_have_no_precision(tmp_path: Path) -> None:
    extract(tmp_path / "neurons.act", saes=["neurons:mlp_act.1"], **SCREEN)
    assert "sae_precision" not in recipes(tmp_path / "neurons.act")[0]


def test_a_coder_that_keeps_the_largest_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"keeps the 5 largest features.*leave out --sae-precision screen"):
        extract(tmp_path / "top.act", saes=[coders()[2]], **SCREEN)
    assert not (tmp_path / "top.act").exists()


@pytest.mark.parametrize("precision", ["tf32", "", "SCREEN"])
def test_another_precision_is_refused(precision: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="float32 or screen"):
        extract(tmp_path / "odd.act", sae_precision=precision, **NO_LENS)


def test_the_commands_take_it(tmp_path: Path) -> None:
    store = tmp_path / "sites.act"
    extract(store, saes=[], **NO_LENS)
    options = ["--sae-precision", "screen", "--device", "cpu", "--no-index", "--allow-unhealthy"]
    done = CliRunner().invoke(main, ["encode", str(store), tiny_world().residual_sae, *options])
    assert done.exit_code == 0, done.output
    assert [recipe.get("sae_precision") for recipe in recipes(store)] == [None, "screen"]
