"""Writing a store's files with their proofs, and the names of everything in it (docs/format.md §1, §2)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actstore.sealed import fsync_directory, sha256_hex, translate_full_disk, write_durably

from .layout import FileProof
from .plain_shards import PlainShard

__all__ = [
    "ARRAYS",
    "LAYOUT_FILE",
    "STORE_FILE",
    "firings_file",
    "is_row_keyed",
    "make_directory",
    "matrix_file",
    "manifest_file",
    "metadata_file",
    "pass_file",
    "prove_and_write",
    "receipt_file",
    "values_digest",
    "write_groups",
]

STORE_FILE, LAYOUT_FILE, ARRAYS = "store.json", "layout.json", "arrays"


def metadata_file(path: str) -> str:
    """Return where the `zarr.json` of an array or group below `arrays/` lies."""
    return f"{ARRAYS}/{path}/zarr.json" if path else f"{ARRAYS}/zarr.json"


def is_row_keyed(path: str) -> bool:
    """Return whether a `zarr.json` is that of an array whose first axis is `row`."""
    parts = path.split("/")[1:-1]
    depths = {"corpus": 2, "sites": 2, "scales": 2, "predictions": 2, "reconstruction": 2, "attention": 3, "lens": 4}
    depth = depths.get(parts[0] if parts else "")
    return depth == len(parts) and parts[:2] != ["corpus", "segments"]


def matrix_file(path: str, shard: int, n_axes: int = 2) -> str:
    """Return where one shard of a row-keyed matrix lies."""
    return f"{ARRAYS}/{path}/" + ".".join(["c", str(shard), *["0"] * (n_axes - 1)])


def firings_file(sae: str, shard: int) -> str:
    """Return where one shard's firings of an SAE lie."""
    return f"firings/{sae}/{shard}.zip"


def pass_file(pass_id: str) -> str:
    """Return where a pass says what it makes."""
    return f"passes/{pass_id}/pass.json"


def receipt_file(pass_id: str, shard: int) -> str:
    """Return where the receipt of (pass, shard) lies until its segment is sealed."""
    return f"passes/{pass_id}/receipts/{shard}.json"


def manifest_file(pass_id: str, segment: int) -> str:
    """Return where the sealed manifest of (pass, segment) lies."""
    return f"passes/{pass_id}/sealed-{segment}.json"


def values_digest(arrays: Iterable[npt.NDArray[Any]]) -> str:
    """Return the SHA-256 of arrays' values, little-endian, in C order, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        plain = np.ascontiguousarray(array)
        digest.update(plain.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def make_directory(directory: Path) -> None:
    """Make a directory, and those above it that are missing, so that their names survive a power loss.

    Raises NoSpace where the disk is full.
    """
    if directory.is_dir():
        return
    make_directory(directory.parent)
    with translate_full_disk(directory):
        directory.mkdir(exist_ok=True)
        fsync_directory(directory.parent)


def prove_and_write(
    root: Path, name: str, content: bytes | PlainShard, values: Iterable[npt.NDArray[Any]] | None
) -> FileProof:
    """Write a file durably; return what proves it."""
    data, chunks = (content.file, content.chunks_sha256) if isinstance(content, PlainShard) else (content, None)
    path = root / name
    make_directory(path.parent)
    with ThreadPoolExecutor(2) as threads:  # both digests while the disk is waited for
        of_file = threads.submit(sha256_hex, data)
        of_values = None if values is None else threads.submit(values_digest, values)
        write_durably(path, data)
    return FileProof(len(data), of_file.result(), None if of_values is None else of_values.result(), chunks)


def write_groups(root: Path, paths: Iterable[str], group: bytes) -> dict[str, str]:
    """Write the `zarr.json` of every group above these arrays that has none yet; return path → SHA-256 of all."""
    parents = {"/".join(path.split("/")[:depth]) for path in paths for depth in range(path.count("/") + 1)}
    for parent in sorted(parents):
        file = root / metadata_file(parent)
        if not file.exists():
            make_directory(file.parent)
            write_durably(file, group)
    return {metadata_file(parent): sha256_hex(group) for parent in parents}
