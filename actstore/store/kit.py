"""Kit pieces: content-addressed bundles that lenses need without the model (docs/format.md §8).

Which pieces there are, and what is in them, is said there; a piece may be larger than the memory.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr

from actstore.errors import CorruptStore, explain
from actstore.sealed import partial_path, translate_full_disk

from .bundle import open_bundle_file, write_large_bundle
from .files import make_directory
from .location import Location
from .sharing import publish_shared

__all__ = ["kit_file", "open_piece", "pack_texts", "unpack_texts", "write_piece"]


CHUNK_BYTES = 4 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")


def kit_file(digest: str) -> str:
    """Return where the kit piece with this digest lies; raises CorruptStore for what is no digest."""
    if not SHA256.fullmatch(digest):
        raise CorruptStore(explain(f"A kit piece is called {digest!r}", accepted="64 hexadecimal digits"))
    return f"kit/{digest}.zip"


def write_piece(
    root: Path, arrays: Mapping[str, tuple[npt.NDArray[Any], tuple[str, ...]]], attributes: Mapping[str, Any]
) -> str:
    """Write a kit piece unless it is there already; return its digest, which is its name.

    Arrays are written a chunk at a time and never copied whole; their bytes are shared with other stores of the machine
    where the file system can. Raises NoSpace where the disk is full.
    """
    home = root / "kit"
    make_directory(home)
    partial = partial_path(home / "piece")  # its name follows from its bytes
    with translate_full_disk(partial):
        try:
            with partial.open("wb+") as file:
                write_large_bundle(file, arrays, attributes, CHUNK_BYTES)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not (root / kit_file(digest)).exists():
                publish_shared(partial, root / kit_file(digest), digest)
        finally:
            partial.unlink(missing_ok=True)
    return digest


def open_piece(location: Location, digest: str) -> zarr.Group:
    """Return a kit piece, from the store or from the local cache that stores share."""
    return open_bundle_file(location.fetch(kit_file(digest), digest))


def pack_texts(texts: list[str]) -> dict[str, tuple[npt.NDArray[Any], tuple[str, ...]]]:
    """Return the arrays of a `vocabulary` piece."""
    encoded = [text.encode() for text in texts]
    bounds = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in encoded], out=bounds[1:])
    return {
        "text": (np.frombuffer(b"".join(encoded), dtype=np.uint8), ("byte",)),
        "bounds": (bounds, ("token_bound",)),
    }


def unpack_texts(text: npt.NDArray[np.uint8], bounds: npt.NDArray[np.int64]) -> pa.Array:
    """Return packed texts as an Arrow large_string array, without copying the text.

    Raises CorruptStore where the bounds are not those of texts: Arrow would read past the buffer's end.
    """
    starts = np.ascontiguousarray(bounds - bounds[:1], dtype=np.int64)
    values = pa.py_buffer(np.ascontiguousarray(text, dtype=np.uint8))
    try:
        texts = pa.LargeStringArray.from_buffers(max(0, len(starts) - 1), pa.py_buffer(starts), values)
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        raise CorruptStore(explain(f"Texts are not what was written ({error})", next_step="actstore verify")) from None
    return texts
