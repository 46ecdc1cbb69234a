"""Sites stored as int8: every door gives float32, runs resume byte for byte, and what was lost is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from encode_support import encode
from safetensors.numpy import load_file
from store_support import extract_some, hashes, truth
from tiny_world import RESIDUAL_SAE, SHARD_ROWS, extract, tiny_world

import actstore
from actstore import maintenance
from actstore.errors import InvalidInput
from actstore.extraction import Request, plan_extraction
from actstore.quantised import GROUP
from actstore.store import StoreReader

SITES = ["resid_post.1", "z.0"]
OPTIONS: dict[str, Any] = {"sites": SITES, "storage_dtype": "int8"}


@cache
def _home() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="tiny-int8-")


@cache
def small() -> Path:
    """Return a complete store of int8 sites that nobody may change."""
    extract(Path(_home().name) / "small.act", **OPTIONS)
    return Path(_home().name) / "small.act"


@cache
def exact() -> Path:
    """Return the same store in float32."""
    extract(Path(_home().name) / "exact.act", sites=SITES)
    return Path(_home().name) / "exact.act"


@pytest.fixture
def opened() -> Iterator[actstore.api.Store]:
    with actstore.open(small()) as store:
        yield store


@cache
def read_plainly(site: str) -> np.ndarray:
    """Return a site's rows by zarr and a multiplication alone: float32 (row, width), filler included."""
    group = zarr.open_group(small() / "arrays", mode="r")
    values, scales = (np.asarray(group[f"{home}/{site}"]) for home in ("sites", "scales"))
    return np.stack([values[:, column] * scales[:, column // GROUP] for column in range(values.shape[1])], axis=1)


def rows_in_use() -> np.ndarray:
    return np.flatnonzero(~np.isnan(read_plainly("z.0")).any(axis=1))


def health(store: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["name"], row["subject"]): row for row in StoreReader(store).tables()["health"]}


@pytest.mark.parametrize("site", SITES)
def test_two_plain_arrays_say_it_all_and_filler_is_not_a_number(site: str) -> None:
    reader, plainly = StoreReader(small()), read_plainly(site)
    places = np.arange(len(plainly)) % SHARD_ROWS
    used = places < np.repeat(reader.rows_used, SHARD_ROWS)

    assert plainly.dtype == np.float32 and np.isnan(plainly[~used]).all() and (~used).any()
    assert np.isfinite(plainly[used]).all()
    with actstore.open(exact()) as store:
        numbers = store[site][:]
    error = np.linalg.norm(plainly[used] - numbers) / np.linalg.norm(numbers)
    assert 0 < error < 0.01


@pytest.mark.parametrize("site", SITES)
def test_every_door_gives_the_same_float32(opened: actstore.api.Store, site: str, tmp_path: Path) -> None:
    plainly, used = read_plainly(site), rows_in_use()
    expected = plainly[used]

    np.testing.assert_array_equal(opened[site][used], expected)
    np.testing.assert_array_equal(opened[site][:], expected)
    assert opened[site][used].dtype == np.float32 and opened[site].zarr.dtype == np.int8
    for shard, n_rows in enumerate(opened.reader.rows_used):
        first = shard * SHARD_ROWS
        np.testing.assert_array_equal(opened.reader.matrix(f"sites/{site}", shard), plainly[first : first + n_rows])
    some = opened.sql(f"SELECT row, act('{site}', row) AS x FROM tokens ORDER BY hash(row) LIMIT 20").table
    np.testing.assert_array_equal(np.stack(some["x"].to_numpy()), plainly[np.asarray(some["row"])])
    for dtype in ("stored", "float32"):
        for batch in opened.loader(site, 50, with_rows=True, dtype=dtype):
            assert batch[site].dtype == torch.float32
            np.testing.assert_array_equal(batch[site].numpy(), plainly[batch["row"].numpy()])
    opened.export([site], format="safetensors", out=tmp_path / "a.safetensors")
    opened.export([site], format="npy", out=tmp_path / "a.npy")
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")[site], expected)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), expected)


def test_tables_say_how_a_site_is_stored(opened: actstore.api.Store) -> None:
    found = opened.sql("SELECT site, dtype, width FROM sites ORDER BY site").table.to_pylist()
    assert found == [
        {"site": "resid_post.1", "dtype": "int8", "width": 32},
        {"site": "z.0", "dtype": "int8", "width": 40},
    ]


def test_what_was_lost_is_a_row_of_health(opened: actstore.api.Store) -> None:
    flags = np.concatenate([opened.reader.tokens(shard)[:, 5] for shard in range(opened.reader.layout.n_shards)])
    for site in SITES:
        with actstore.open(exact()) as store:
            was = store[site][:][flags == 0].astype(np.float64)
        now = opened[site][:][flags == 0].astype(np.float64)
        row = health(small())["site_rounding", site]
        assert row["value"] == pytest.approx(np.linalg.norm(now - was) / np.linalg.norm(was), rel=1e-3)
        assert row["ok"] is True
        assert f"int8 on {len(was)} plain rows; {((now == 0) & (was != 0)).mean():.2%} of the values" in row["expected"]
    assert not [name for name, _ in health(exact()) if name == "site_rounding"]


def test_firings_and_lenses_are_those_of_the_model_not_of_what_is_stored() -> None:
    for home in ("firings", "arrays/reconstruction", "arrays/predictions", "arrays/lens"):
        assert hashes(small(), home) == hashes(exact(), home)


def test_verify_proves_sites_and_scales(tmp_path: Path) -> None:
    extract(tmp_path / "a.act", **OPTIONS)
    assert maintenance.verify(tmp_path / "a.act").ok
    file = tmp_path / "a.act/arrays/scales/z.0/c.1.0"
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    assert ["scales/z.0/c.1.0" in fault for fault in maintenance.verify(tmp_path / "a.act").faults] == [True]


def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    extract_some(tmp_path / "a.act", 2, **OPTIONS)
    assert extract(tmp_path / "a.act", **OPTIONS).complete
    assert truth(tmp_path / "a.act") == truth(small())


@pytest.mark.slow
def test_a_further_pass_and_further_documents(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract(out)
    before = hashes(out, "arrays/sites", "firings")
    further: dict[str, Any] = {"dataset": None, "saes": [], "lens_k": 0, "lens_sites": [], "into": True}
    assert extract(out, sites=["z.0"], storage_dtype="int8", **further).complete
    assert before.items() <= hashes(out, "arrays/sites", "firings").items()
    assert hashes(out, "arrays/sites/z.0") == hashes(small(), "arrays/sites/z.0")
    extract(out, append=str(tiny_world().more))
    extract(out, sites=["z.0"], storage_dtype="int8", **further)
    assert maintenance.verify(out).ok
    with actstore.open(out) as store:
        assert np.isfinite(store["z.0"][:]).all() and len(store["z.0"][:]) == store.reader.layout.n_rows


def test_dropping_a_site_drops_its_scales_alone(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract(out, **OPTIONS)
    maintenance.drop(out, "z.0")
    assert not (out / "arrays/sites/z.0").exists() and not (out / "arrays/scales/z.0").exists()
    with actstore.open(out) as store:
        assert store.sites == ["resid_post.1"] and np.isfinite(store["resid_post.1"][:]).all()
    assert maintenance.verify(out).ok


def test_encoding_from_int8_says_that_it_was_rounded(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract(out, **OPTIONS)
    encode(out, [tiny_world().residual_sae.replace(RESIDUAL_SAE, "again", 1)])
    check = health(out)["sae_flips", "again"]
    was, now = (_places(out, sae) for sae in (RESIDUAL_SAE, "again"))
    assert check["value"] == pytest.approx(1000 * len(was ^ now) / len(was)) and check["ok"] is None
    assert "with rounding: resid_post.1" in check["expected"] and was != now


def _places(store: Path, sae: str) -> set[tuple[int, int]]:
    firings = StoreReader(store).firings(sae, 0)
    return set(zip(firings.rows().tolist(), firings.features.tolist(), strict=True))


def test_the_plan_counts_a_byte_for_a_number_and_less_for_its_scale(tmp_path: Path) -> None:
    world = tiny_world()
    asked: dict[str, Any] = {"model": str(world.model), "dataset": str(world.dataset), "sites": ("z.0",)}
    sizes = {
        dtype: next(
            one.n_bytes
            for one in plan_extraction(
                Request(**asked, out=tmp_path / "a.act", storage_dtype=dtype, device="cpu")
            ).artifacts
            if one.artifact == "sites/z.0"
        )
        for dtype in ("float32", "int8")
    }
    assert 0.25 < sizes["int8"] / sizes["float32"] < 0.30


def test_int8_is_no_compute_dtype(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="int8"):
        extract(tmp_path / "a.act", dtype="int8")


def test_a_store_of_another_storage_dtype_is_not_resumed(tmp_path: Path) -> None:
    extract(tmp_path / "a.act", max_tokens=60, with_index=False, **OPTIONS)
    recipe = json.loads(next((tmp_path / "a.act").glob("passes/*/pass.json")).read_text())["recipe"]
    assert recipe["storage_dtype"] == "int8"
    with pytest.raises(InvalidInput, match=r"storage_dtype.*int8.*float32"):
        extract(tmp_path / "a.act", sites=SITES, max_tokens=60)
