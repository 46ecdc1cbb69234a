"""What cannot be exported is said, and nothing is left behind; the command does what the method does."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking_support import ATT, RES, SmallStore
from click.testing import CliRunner
from exports_support import Raw

import actstore
from actstore.api import Store
from actstore.cli import main
from actstore.errors import (
    ActstoreError,
    InvalidInput,
    MissingDependency,
    MissingInput,
    NoSpace,
    UnknownName,
    UnsupportedFormat,
)
from actstore.exports import hierarchy, parquet_files
from actstore.store import StoreReader

SITE = "resid_post.3"
CASES: dict[str, tuple[list[str], str, dict[str, Any], type[ActstoreError], list[str]]] = {
    "a table that is none": (["tokns"], "parquet", {}, UnknownName, ["'tokns'", "Did you mean 'tokens'", RES]),
    "a site as a table": ([SITE], "parquet", {}, UnsupportedFormat, [f"{SITE} is a site", "safetensors or npy"]),
    "a site as an SAE": ([SITE], "anndata", {}, UnsupportedFormat, [f"{SITE} --format safetensors --out FILE"]),
    "an SAE that is not stored": (["3-tiny"], "anndata", {}, UnknownName, ["'3-tiny'", RES, "--sae"]),
    "a table as an SAE": (["tokens"], "neuronpedia", {}, UnknownName, ["'tokens'", ATT]),
    "a site that is not stored": (["resid_post.9"], "npy", {}, UnknownName, ["resid_post.9", SITE, "--site"]),
    "an SAE as a site": ([SITE, RES], "safetensors", {}, UnknownName, [RES, "--site"]),
    "two sites in one array": ([SITE, "z.2"], "npy", {}, InvalidInput, ["2 things", "one site"]),
    "two SAEs in one file": ([RES, ATT], "anndata", {}, InvalidInput, ["2 things", "one SAE"]),
    "nothing": ([], "parquet", {}, InvalidInput, ["[]", "parquet"]),
    "a format that is none": ([RES], "csv", {}, UnknownName, ["'csv'", "parquet"]),
    "an option of another format": ([RES], "parquet", {"plain": True}, InvalidInput, ["parquet", "'plain'", "none"]),
    "a type that is none": ([SITE], "safetensors", {"dtype": "int8"}, InvalidInput, ["'int8'", "bfloat16"]),
    "rows by what is not known": ([RES], "anndata", {"by": "segment"}, InvalidInput, ["'segment'", "token, document"]),
    "documents that are not reduced": ([RES], "anndata", {"by": "document"}, InvalidInput, ["sum, mean, max"]),
    "tokens that are reduced": ([RES], "anndata", {"reduce": "max"}, InvalidInput, ["not reduced"]),
    "a reduction that is none": ([RES], "anndata", {"by": "document", "reduce": "p"}, InvalidInput, ["'p'", "mean"]),
}


@pytest.mark.parametrize(("what", "form", "options", "kind", "parts"), CASES.values(), ids=CASES)
def test_what_cannot_be_is_refused(
    opened: Store,
    tmp_path: Path,
    what: list[str],
    form: str,
    options: dict[str, Any],
    kind: type[ActstoreError],
    parts: list[str],
) -> None:
    with pytest.raises(kind) as caught:
        opened.export(what, format=form, out=tmp_path / "out.h5ad", **options)
    assert all(part in str(caught.value) for part in [*parts, "Accepted"]), caught.value
    assert not list(tmp_path.iterdir())


def test_a_text_is_no_list(opened: Store, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="'tokens' says not what to export"):
        opened.export("tokens", format="parquet", out=tmp_path / "out")


EVERY = {
    "parquet": ["tokens", RES],
    "anndata": [RES],
    "neuronpedia": [RES],
    "safetensors": [SITE],
    "npy": [SITE],
}


@pytest.mark.parametrize("form", EVERY)
def test_what_is_there_is_never_replaced(opened: Store, tmp_path: Path, form: str) -> None:
    out = tmp_path / "out.h5ad"
    out.write_text("precious")
    with pytest.raises(InvalidInput, match=r"out\.h5ad is there already.*another --out"):
        opened.export(EVERY[form], format=form, out=out)
    assert out.read_text() == "precious" and list(tmp_path.iterdir()) == [out]


def test_row_numbers_that_are_there_are_never_replaced(opened: Store, tmp_path: Path) -> None:
    beside = tmp_path / "site.npy.rows.npy"
    beside.write_text("precious")
    with pytest.raises(InvalidInput, match="is there already"):
        opened.export([SITE], format="npy", out=tmp_path / "site.npy")
    assert beside.read_text() == "precious" and list(tmp_path.iterdir()) == [beside]


@pytest.mark.parametrize("form", EVERY)
def test_a_directory_that_is_missing(opened: Store, tmp_path: Path, form: str) -> None:
    with pytest.raises(MissingInput, match=r"no directory .*mkdir -p"):
        opened.export(EVERY[form], format=form, out=tmp_path / "nowhere" / "out.h5ad")


def test_a_name_that_says_no_format(opened: Store, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"out\.csv.*\.h5ad or \.zarr"):
        opened.export([RES], format="anndata", out=tmp_path / "out.csv")


class Interrupted(Exception):
    """What a test raises in the middle."""


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at_call: int, error: Exception) -> None:
    """Make the given call of a method raise."""
    original, calls = getattr(owner, name), []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == at_call:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


BROKEN = {
    "parquet": (parquet_files.ParquetFolder, "append", "out"),
    "anndata": (StoreReader, "firings", "out.h5ad"),
    "anndata as zarr": (hierarchy.Column, "append", "out.zarr"),
    "neuronpedia": (sys.modules["gzip"].GzipFile, "write", "out"),
    "safetensors": (StoreReader, "matrix", "out"),
    "npy": (StoreReader, "matrix", "out"),
}


@pytest.mark.parametrize("error", [Interrupted(), OSError(errno.ENOSPC, "No space left on device")], ids=["", "full"])
@pytest.mark.parametrize("name", BROKEN)
def test_an_export_that_fails_leaves_nothing(
    opened: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> None:
    owner, method, out = BROKEN[name]
    form = name.split()[0]
    interrupt(monkeypatch, owner, method, 2, error)
    with pytest.raises(Interrupted if isinstance(error, Interrupted) else NoSpace):
        opened.export(EVERY[form], format=form, out=tmp_path / out)
    assert not list(tmp_path.iterdir())


def test_row_numbers_go_when_their_file_cannot_be_finished(
    opened: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actstore.exports import target

    interrupt(monkeypatch, target, "publish", 2, Interrupted())  # the first is that of the numbers
    with pytest.raises(Interrupted):
        opened.export([SITE], format="npy", out=tmp_path / "site.npy")
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named_with_its_install_line(
    opened: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingDependency, match=r"h5py is not installed.*pip install.*\.zarr"):
        opened.export([RES], format="anndata", out=tmp_path / "out.h5ad")
    assert not list(tmp_path.iterdir())


def test_a_store_without_index(copied: Callable[[], Path], tmp_path: Path) -> None:
    store = copied()
    (store / "index" / "CURRENT").unlink()
    with actstore.open(store) as bare:
        for form in ("parquet", "anndata", "neuronpedia"):
            with pytest.raises(MissingInput, match="actstore index"):
                bare.export(EVERY[form], format=form, out=tmp_path / "out.h5ad")
        bare.export([SITE], format="npy", out=tmp_path / "site.npy")  # reads only the arrays


# The command


@pytest.mark.parametrize(
    ("form", "out", "options"),
    [
        ("parquet", "out", []),
        ("anndata", "out.h5ad", ["--by", "document", "--reduce", "max"]),
        ("neuronpedia", "out", []),
        ("safetensors", "out.safetensors", ["--plain", "--dtype", "bfloat16"]),
        ("npy", "out.npy", ["--plain"]),
    ],
)
def test_the_command_writes_and_tells(
    small: SmallStore, tmp_path: Path, form: str, out: str, options: list[str]
) -> None:
    target = tmp_path / out
    arguments = ["export", small.path, *EVERY[form], "--format", form, "--out", target, "--json", *options]
    result = CliRunner().invoke(main, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["path"] == str(target) and target.exists() and told["n_bytes"] > 0
    if form == "npy":
        assert told["n_rows"] == Raw(small.path).plain.sum() == len(np.load(target, allow_pickle=False))


def test_the_command_says_one_line_and_fails_with_one(small: SmallStore, tmp_path: Path) -> None:
    arguments = ["export", str(small.path), "features", "--format", "parquet", "--out", str(tmp_path / "out")]
    first, second = (CliRunner().invoke(main, arguments) for _ in range(2))
    assert first.exit_code == 0 and first.stdout.startswith(f"{tmp_path / 'out'}: 352 rows in 2 files, ")
    assert second.exit_code == 1 and second.stderr.startswith("Error: ") and "is there already" in second.stderr
