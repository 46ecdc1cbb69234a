"""What exports are compared with: the raw Zarr arrays of a store, read with zarr and numpy and nothing of ours."""

from __future__ import annotations

import gzip
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from tiny_world import RESIDUAL_SAE, WORDS, extract
from zarr.storage import ZipStore

__all__ = ["MANY_SAE", "MANY_SITE", "Raw", "json_lines", "many_shards"]

MANY_SAE, MANY_SITE = RESIDUAL_SAE, "resid_post.1"
FIELDS = ("token_id", "seq", "pos", "char_start", "char_end", "flags", "role")


class Raw:
    """A store's arrays over the rows in use."""

    def __init__(self, store: Path) -> None:
        self.store = store
        tokens = np.asarray(zarr.open_array(store / "arrays/corpus/tokens", mode="r")[:])
        self.in_use = tokens[:, 0] >= 0
        self.rows = np.flatnonzero(self.in_use)
        self.tokens = {name: tokens[self.in_use, place] for place, name in enumerate(FIELDS)}
        self.plain = self.tokens["flags"] == 0
        segments = sorted((store / "arrays/corpus/segments").glob("[0-9]*"), key=lambda path: int(path.name))
        of = [np.asarray(zarr.open_array(path / "sequences", mode="r")[:]) for path in segments]
        self.sequences = np.concatenate(of)  # (seq, field): doc, row, n_tokens
        self.docs = self.sequences[self.tokens["seq"], 0]
        self.n_docs = sum(zarr.open_array(path / "documents", mode="r").shape[0] for path in segments)

    def site(self, name: str) -> npt.NDArray[Any]:
        """Return a site: (row, width) in its stored dtype."""
        return np.asarray(zarr.open_array(self.store / f"arrays/sites/{name}", mode="r")[:])[self.in_use]

    def firings(self, sae: str) -> npt.NDArray[np.float32]:
        """Return the activations of an SAE as a dense matrix (row, feature)."""
        shards = sorted((self.store / f"firings/{sae}").glob("[0-9]*.zip"), key=lambda path: int(path.stem))
        return np.concatenate([self._dense(path) for path in shards])[self.in_use]

    def _dense(self, path: Path) -> npt.NDArray[np.float32]:
        with ZipStore(path, mode="r") as bundle:
            group = zarr.open_group(bundle, mode="r")
            arrays = {name: np.asarray(group[name]) for name in ("data", "indices", "indptr")}
            shape: Any = group.attrs["shape"]
        dense = np.zeros(tuple(shape), np.float32)
        places = np.repeat(np.arange(len(dense)), np.diff(arrays["indptr"]))
        dense[places, arrays["indices"]] = arrays["data"]
        return dense


@cache
def many_shards() -> Path:
    """Return a store of many small shards: documents that go on from shard to shard, a bfloat16 site, exact firings."""
    random = np.random.default_rng(3)
    texts = [" ".join(random.choice(WORDS, size=size)) for size in (2, 150, 9, 40, 300, 1, 220, 60, 5, 180, 400, 3, 90)]
    store = Path(_home().name) / "many.act"
    changes: dict[str, Any] = {"dataset": ["", *texts, ""], "lens_k": 0, "lens_sites": [], "storage_dtype": "bfloat16"}
    assert extract(store, **changes, activation_bits=23).complete
    return store


@cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="many-shards-")


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a gzipped or plain file."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]
