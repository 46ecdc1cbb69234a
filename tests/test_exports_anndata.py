"""AnnData: tokens or documents × features, written shard by shard, read back by anndata itself."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse
from asking_support import RES, SmallStore
from exports_support import MANY_SAE, Raw, many_shards
from store_support import extract_some
from tiny_world import extract

import actstore
from actstore.api import Store
from actstore.blocks import RowFirings
from actstore.errors import InvalidInput
from actstore.exports import Source, export, hierarchy
from actstore.maintenance import index, label
from actstore.store import StoreReader

REDUCTIONS = ["sum", "mean", "max", "count"]


def read(path: Path) -> anndata.AnnData:
    return anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)


@pytest.fixture(scope="module", params=[".h5ad", ".zarr"])
def by_token(request: pytest.FixtureRequest, opened: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("anndata") / f"tokens{request.param}"
    return opened.export([RES], format="anndata", out=out).path


def test_tokens_by_features_are_the_firings(by_token: Path, small: SmallStore) -> None:
    found, raw = read(by_token), Raw(small.path)
    assert isinstance(found.X, scipy.sparse.csr_matrix) and found.X.dtype == np.float32
    assert np.array_equal(found.X.toarray(), raw.firings(RES))
    assert found.X.has_sorted_indices and found.X.indices.dtype == found.X.indptr.dtype == np.int32
    assert list(found.obs_names) == [str(row) for row in raw.rows]
    assert list(found.var_names) == [str(feature) for feature in range(256)]


def test_obs_are_the_columns_of_tokens(by_token: Path, opened: Store) -> None:
    obs = read(by_token).obs
    expected = opened.sql("SELECT * FROM tokens ORDER BY row").df()
    assert list(obs.columns) == list(expected.columns)
    for name in expected.columns.drop(["token", "role"]):
        assert np.array_equal(obs[name], expected[name]), name
    assert obs["token"].astype(str).tolist() == expected["token"].tolist()
    assert obs["role"].isna().all()


def test_var_are_the_features(by_token: Path, opened: Store) -> None:
    found = read(by_token)
    expected = opened.sql("SELECT * FROM features WHERE sae = ? ORDER BY feature", [RES]).df()
    assert list(found.var.columns) == [name for name in expected.columns if name not in ("sae", "histogram")]
    for name in found.var.columns.drop("label"):
        assert np.array_equal(found.var[name], expected[name]), name
    assert np.array_equal(found.varm["histogram"], np.stack(expected["histogram"].tolist()))
    facts = {"model", "sae", "site", "by", "reduce"}
    assert set(found.uns["actstore"]) == facts and found.uns["actstore"]["site"] == "resid_post.3"


def test_a_file_can_stay_on_disk_while_it_is_read(opened: Store, small: SmallStore, tmp_path: Path) -> None:
    out = opened.export([RES], format="anndata", out=tmp_path / "tokens.h5ad").path
    backed = anndata.read_h5ad(out, backed="r")
    try:
        some = backed[100:140, 3:50].to_memory()
    finally:
        backed.file.close()
    assert np.array_equal(some.X.toarray(), Raw(small.path).firings(RES)[100:140, 3:50])


def documents_by_hand(raw: Raw, sae: str, reduce: str) -> np.ndarray:
    """Return (document, feature), one document after the other."""
    firings, out = raw.firings(sae), []
    for doc in range(raw.n_docs):
        own = firings[(raw.docs == doc) & raw.plain].astype(np.float64)
        if not len(own):
            out.append(np.zeros(firings.shape[1]))
        else:
            ways = {"sum": own.sum(0), "mean": own.mean(0), "max": own.max(0), "count": (own > 0).sum(0)}
            out.append(ways[reduce])
    return np.array(out)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_documents_are_reduced_over_their_plain_rows(
    opened: Store, small: SmallStore, tmp_path: Path, reduce: str, suffix: str
) -> None:
    out = tmp_path / f"documents{suffix}"
    found = read(opened.export([RES], format="anndata", out=out, by="document", reduce=reduce).path)
    raw = Raw(small.path)
    np.testing.assert_allclose(found.X.toarray(), documents_by_hand(raw, RES, reduce), rtol=1e-6)
    assert found.obs["n_plain"].tolist() == [int((raw.plain & (raw.docs == doc)).sum()) for doc in range(raw.n_docs)]
    assert found.obs["n_plain"].min() == 0, "a document without text is there too"
    assert list(found.obs_names) == [str(doc) for doc in range(raw.n_docs)]
    expected = opened.sql("SELECT * EXCLUDE (text) FROM documents ORDER BY doc").df()
    assert list(found.obs.columns) == [*expected.columns, "n_plain"]
    assert found.obs["metadata"].tolist() == expected["metadata"].tolist()
    assert found.obs["parent"].isna().all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_documents_that_go_on_in_the_next_shard_are_one(tmp_path: Path, reduce: str) -> None:
    raw = Raw(many_shards())
    with actstore.open(many_shards()) as store:
        shards = raw.rows // store.reader.shard_rows
        assert max(len(np.unique(shards[raw.docs == doc])) for doc in range(raw.n_docs)) > 3
        out = tmp_path / "documents.h5ad"
        store.export([MANY_SAE], format="anndata", out=out, by="document", reduce=reduce)
    np.testing.assert_allclose(read(out).X.toarray(), documents_by_hand(raw, MANY_SAE, reduce), rtol=1e-6)


def test_of_an_extraction_that_goes_on_tokens_are_written_and_documents_refused(tmp_path: Path) -> None:
    extract_some(tmp_path / "some.act", 3)
    index(tmp_path / "some.act")
    with actstore.open(tmp_path / "some.act") as store:
        done = list(store.reader.done(f"firings/{MANY_SAE}"))
        found = read(store.export([MANY_SAE], format="anndata", out=tmp_path / "tokens.h5ad").path)
        with pytest.raises(InvalidInput, match=r"3 of 6 shards: documents would be cut"):
            store.export([MANY_SAE], format="anndata", out=tmp_path / "d.h5ad", by="document", reduce="sum")
    rows = Raw(tmp_path / "some.act").rows
    assert list(found.obs["row"]) == [row for row in rows.tolist() if row // 64 in done]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_shards_are_read_once_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(hierarchy, "CHUNK", 1 << 14)  # chunks end within shards
    read_shards: list[int] = []
    alive: list[weakref.ref[RowFirings]] = []
    most = 0
    firings = StoreReader.firings

    def counted(self: StoreReader, sae: str, shard: int) -> Any:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        found = firings(self, sae, shard)
        read_shards.append(shard)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(StoreReader, "firings", counted)
    with actstore.open(many_shards()) as store:
        out = store.export([MANY_SAE], format="anndata", out=tmp_path / f"tokens{suffix}").path
        assert read_shards == list(range(store.reader.layout.n_shards)) and len(read_shards) > 20
    assert most <= 1
    assert np.array_equal(read(out).X.toarray(), Raw(many_shards()).firings(MANY_SAE))


def test_bounds_are_wide_where_there_may_be_many_firings(opened: Store, small: SmallStore, tmp_path: Path) -> None:
    catalog, connection = opened.catalog, opened._connection
    many = replace(catalog, parts=tuple(replace(part, n_rows=1 << 31) for part in catalog.parts))
    source = Source(opened.url, opened.reader, lambda: (many, connection))
    found = read(export(source, [RES], form="anndata", out=tmp_path / "tokens.h5ad").path)
    assert found.X.indices.dtype == found.X.indptr.dtype == np.int64
    assert np.array_equal(found.X.toarray(), Raw(small.path).firings(RES))


def test_texts_with_nul_are_written(tmp_path: Path) -> None:
    extract(tmp_path / "nul.act", lens_k=0, lens_sites=[], dataset=["a\0b then\0", "the cat"])
    with actstore.open(tmp_path / "nul.act") as store:
        out = store.export([MANY_SAE], format="anndata", out=tmp_path / "nul.h5ad").path
        tokens = [row["token"] for row in store.sql("SELECT token FROM tokens ORDER BY row").rows()]
    assert read(out).obs["token"].astype(str).tolist() == [token.replace("\0", "\u2400") for token in tokens]


def test_labels_come_along(opened: Store, copied: Any, tmp_path: Path) -> None:
    store = copied()
    (tmp_path / "labels.csv").write_text(f"sae,feature,label\n{RES},3,ends of sentences\n")
    label(store, tmp_path / "labels.csv")
    with actstore.open(store) as changed:
        found = read(changed.export([RES], format="anndata", out=tmp_path / "tokens.h5ad").path)
    assert found.var["label"].dropna().to_dict() == {"3": "ends of sentences"}


def test_scanpy_takes_it(opened: Store, tmp_path: Path) -> None:
    scanpy = pytest.importorskip("scanpy", reason="scanpy is not installed")
    out = opened.export([RES], format="anndata", out=tmp_path / "documents.h5ad", by="document", reduce="max").path
    found = scanpy.read_h5ad(out)
    scanpy.pp.calculate_qc_metrics(found, percent_top=None, inplace=True)
    assert np.array_equal(found.var["n_cells_by_counts"], (found.X.toarray() > 0).sum(0))
    scanpy.pp.pca(found, n_comps=3)
    assert found.obsm["X_pca"].shape == (len(found.obs), 3)
