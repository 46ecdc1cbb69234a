"""What a store gives, opened by the tools that people use: AnnData, scanpy, Polars, pandas, Hugging Face datasets."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata
import datasets
import numpy as np
import pandas
import polars
import pytest
from asking_support import RES, SmallStore

from actstore.api import Store

QUESTION = f"""
    SELECT t.row, t.token, t.is_special, d.metadata, act('z.2', t.row) AS z, firings('{RES}', t.row) AS fired
    FROM tokens t JOIN documents d USING (doc) ORDER BY t.row LIMIT 50
"""


@pytest.fixture(scope="module")
def replica(opened: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet of the tokens and of an SAE's firings."""
    out = tmp_path_factory.mktemp("replica") / "replica"
    return opened.export(["tokens", RES], format="parquet", out=out).path


def parquet(replica: Path, name: str) -> list[str]:
    """Return the files of what the replica has of a name."""
    found = sorted(str(path) for path in replica.rglob("*.parquet") if name in str(path.relative_to(replica)))
    assert found, sorted(replica.rglob("*"))
    return found


def test_polars(opened: Store, replica: Path) -> None:
    result = opened.sql(QUESTION)
    frame = polars.DataFrame(result)  # by the Arrow interface, without a conversion of ours
    assert frame.equals(result.pl())
    assert frame.to_dicts() == result.rows()
    read = polars.scan_parquet(parquet(replica, "tokens")).select(polars.len()).collect().item()
    assert read == opened.sql("SELECT count(*) FROM tokens").scalar()


def test_pandas(opened: Store, replica: Path) -> None:
    result = opened.sql(QUESTION)
    frame = result.df()
    assert frame["token"].tolist() == [row["token"] for row in result.rows()]
    np.testing.assert_array_equal(np.stack(frame["z"].to_list()), result.numpy()["z"])
    tokens = pandas.concat(pandas.read_parquet(file) for file in parquet(replica, "tokens"))
    assert tokens["token"].tolist() == opened.sql("SELECT token FROM tokens ORDER BY row").df()["token"].tolist()


def test_datasets(opened: Store, replica: Path, tmp_path: Path) -> None:
    result = opened.sql("SELECT row, token, act('z.2', row) AS z FROM tokens ORDER BY row LIMIT 50")
    made = datasets.Dataset(result.arrow())
    assert made["token"][:] == [row["token"] for row in result.rows()]
    np.testing.assert_array_equal(made.with_format("numpy")["z"][:], result.numpy()["z"])
    read: Any = datasets.load_dataset(
        "parquet", data_files=parquet(replica, "tokens"), split="train", cache_dir=str(tmp_path)
    )
    assert read.num_rows == opened.sql("SELECT count(*) FROM tokens").scalar()


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_anndata(opened: Store, tmp_path: Path, ending: str) -> None:
    out = opened.export([RES], format="anndata", out=tmp_path / f"tokens.{ending}").path
    found = anndata.read_h5ad(out) if ending == "h5ad" else anndata.read_zarr(out)
    slices = opened.activations(RES)[slice(None)]
    np.testing.assert_array_equal(found.X.toarray(), slices.toarray())


def test_a_shard_of_firings_opens_in_anndata_as_it_is(small: SmallStore) -> None:
    import zarr

    group = zarr.open_group(zarr.storage.ZipStore(small.path / f"firings/{RES}/0.zip"), mode="r")
    matrix = anndata.io.sparse_dataset(group).to_memory()
    reader = small.truth.reader
    np.testing.assert_array_equal(matrix.data, reader.firings(RES, 0).activations)


def test_scanpy(opened: Store, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its own imports
        scanpy: Any = pytest.importorskip("scanpy")
    out = opened.export([RES], format="anndata", by="document", reduce="max", out=tmp_path / "documents.h5ad").path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its numba
        found = scanpy.read_h5ad(out)
        scanpy.pp.log1p(found)
        scanpy.pp.pca(found, n_comps=5)
        scanpy.tl.dendrogram(found, groupby=_two_groups(found), n_pcs=5)
    n_docs = opened.sql("SELECT count(*) FROM documents").scalar()
    assert found.obsm["X_pca"].shape == (n_docs, 5)
    assert np.isfinite(found.obsm["X_pca"]).all()


def _two_groups(found: Any) -> str:
    found.obs["half"] = pandas.Categorical(np.where(np.arange(found.n_obs) % 2, "odd", "even"))
    return "half"
