"""Dense sites as .safetensors and .npy: every row in use, in the stored dtype, a shard at a time."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from asking_support import SmallStore
from exports_support import MANY_SITE, Raw, many_shards
from store_support import extract_some
from tiny_world import extract

import actstore
from actstore.api import Store
from actstore.errors import InvalidInput
from actstore.store import StoreReader

SITES = ["resid_post.3", "z.2"]


def row_numbers(out: Path) -> Any:
    return np.load(out.with_name(f"{out.name}.rows.npy"), allow_pickle=False)


@pytest.mark.parametrize("plain", [False, True], ids=["rows in use", "plain rows"])
def test_safetensors_hold_the_sites(opened: Store, small: SmallStore, tmp_path: Path, plain: bool) -> None:
    written = opened.export(SITES, format="safetensors", out=tmp_path / "sites.safetensors", plain=plain)
    raw = Raw(small.path)
    keep = raw.plain if plain else np.ones(len(raw.rows), dtype=bool)
    tensors = safetensors.numpy.load_file(written.path)
    assert sorted(tensors) == SITES
    for site in SITES:
        assert tensors[site].dtype == np.float32 and np.array_equal(tensors[site], raw.site(site)[keep])
    assert np.array_equal(row_numbers(written.path), raw.rows[keep])
    assert (written.n_rows, written.n_files) == (keep.sum(), 2)
    assert written.n_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.parametrize("plain", [False, True], ids=["rows in use", "plain rows"])
def test_npy_holds_a_site(opened: Store, small: SmallStore, tmp_path: Path, plain: bool) -> None:
    out = tmp_path / "site.npy"
    opened.export(["resid_post.3"], format="npy", out=out, plain=plain)
    raw = Raw(small.path)
    keep = raw.plain if plain else np.ones(len(raw.rows), dtype=bool)
    found = np.load(out, mmap_mode="r", allow_pickle=False)
    assert found.dtype == np.float32 and np.array_equal(found, raw.site("resid_post.3")[keep])
    assert np.array_equal(row_numbers(out), raw.rows[keep])


def test_row_numbers_lie_beside_only_where_rows_are_left_out(tmp_path: Path) -> None:
    """One shard that ends with the last row has no filler but at its end."""
    extract(tmp_path / "one.act", saes=[], lens_k=0, lens_sites=[], dataset=["the cat on a hat"])
    with actstore.open(tmp_path / "one.act") as store:
        whole = store.export([MANY_SITE], format="npy", out=tmp_path / "whole.npy")
        plain = store.export([MANY_SITE], format="npy", out=tmp_path / "plain.npy", plain=True)
    raw = Raw(tmp_path / "one.act")
    assert whole.n_files == 1 and not (tmp_path / "whole.npy.rows.npy").exists()
    assert plain.n_files == 2 and np.array_equal(row_numbers(plain.path), raw.rows[raw.plain])


def test_bfloat16_stays_bfloat16_bit_for_bit(tmp_path: Path) -> None:
    with actstore.open(many_shards()) as store:
        out = store.export([MANY_SITE], format="safetensors", out=tmp_path / "site.safetensors").path
    values = Raw(many_shards()).site(MANY_SITE)
    assert values.dtype == ml_dtypes.bfloat16
    found = safetensors.torch.load_file(out)[MANY_SITE]
    assert found.dtype == torch.bfloat16
    assert np.array_equal(found.view(torch.int16).numpy(), values.view(np.int16))
    header = out.read_bytes()[: 8 + int.from_bytes(out.read_bytes()[:8], "little")]
    assert len(header) % 8 == 0 and json.loads(header[8:])[MANY_SITE]["dtype"] == "BF16"


@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_bfloat16_as_float32_is_exact(tmp_path: Path, form: str) -> None:
    out = tmp_path / f"site.{form}"
    with actstore.open(many_shards()) as store:
        store.export([MANY_SITE], format=form, out=out, dtype="float32")
    found = safetensors.numpy.load_file(out)[MANY_SITE] if form == "safetensors" else np.load(out, allow_pickle=False)
    assert found.dtype == np.float32
    assert np.array_equal(found, Raw(many_shards()).site(MANY_SITE).astype(np.float32))


def test_float32_as_bfloat16_is_rounded(opened: Store, small: SmallStore, tmp_path: Path) -> None:
    out = tmp_path / "site.safetensors"
    opened.export(["z.2"], format="safetensors", out=out, dtype="bfloat16")
    expected = Raw(small.path).site("z.2").astype(ml_dtypes.bfloat16)
    found = safetensors.torch.load_file(out)["z.2"].view(torch.int16).numpy()
    assert np.array_equal(found, expected.view(np.int16))


def test_npy_refuses_bfloat16(tmp_path: Path) -> None:
    with actstore.open(many_shards()) as store, pytest.raises(InvalidInput, match=r"bfloat16.*--dtype float32"):
        store.export([MANY_SITE], format="npy", out=tmp_path / "site.npy")
    assert not list(tmp_path.iterdir())


def test_shards_that_are_missing_are_told_by_the_row_numbers(tmp_path: Path) -> None:
    extract_some(tmp_path / "some.act", 3)
    with actstore.open(tmp_path / "some.act") as store:
        done = list(store.reader.done(f"sites/{MANY_SITE}"))
        assert 0 < len(done) < store.reader.layout.n_shards
        out = store.export([MANY_SITE], format="npy", out=tmp_path / "site.npy").path
    raw = Raw(tmp_path / "some.act")
    keep = np.isin(raw.rows // 64, done)
    assert np.array_equal(np.load(out, allow_pickle=False), raw.site(MANY_SITE)[keep])
    assert np.array_equal(row_numbers(out), raw.rows[keep])


def test_sites_over_different_rows_are_not_one_file(
    opened: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = StoreReader.done
    fewer = {"sites/z.2": {0: "", 1: ""}}
    monkeypatch.setattr(StoreReader, "done", lambda self, artifact: fewer.get(artifact) or done(self, artifact))
    with pytest.raises(InvalidInput, match=r"resid_post\.3 is stored over 5 shards and z\.2 over 2"):
        opened.export(SITES, format="safetensors", out=tmp_path / "sites.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_a_store_of_many_shards_is_never_whole_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    read: list[int] = []
    matrix = StoreReader.matrix

    def counted(self: StoreReader, path: str, shard: int) -> Any:
        read.extend([shard] if path == f"sites/{MANY_SITE}" else [])
        return matrix(self, path, shard)

    monkeypatch.setattr(StoreReader, "matrix", counted)
    with actstore.open(many_shards()) as store:
        n_shards = store.reader.layout.n_shards
        assert n_shards > 20
        store.export([MANY_SITE], format=form, out=tmp_path / "warm", dtype="float32")
        read.clear()
        tracemalloc.start()
        written = store.export([MANY_SITE], format=form, out=tmp_path / "cold", dtype="float32")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert read == list(range(n_shards)), "every shard once, in order"
    assert peak < written.n_bytes / 2
