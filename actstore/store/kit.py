"""Kit pieces: content-addressed bundles that lenses need without the model (docs/format.md §8).

Piece `vocabulary`: `text` uint8 (byte), `bounds` int64 (token + 1); token t is shown as text[bounds[t]:bounds[t+1]].
Piece `unembedding`: `weight` (vocabulary, d_model) in the model's dtype, `gain` float32 (d_model);
attributes `softcap`, `norm_epsilon`, `norm`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import zarr

from actstore.errors import CorruptStore, explain
from actstore.sealed import sha256_hex, write_durably

from .bundle import encode_bundle, open_bundle_file
from .files import make_directory
from .location import Location

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
    """Write a kit piece unless it is there already; return its digest, which is its name."""
    # Uncompressed, in large chunks: a lens reads all of it, and weights hardly shrink.
    data = encode_bundle(arrays, attributes, chunk_bytes=CHUNK_BYTES, compressed=False)
    digest = sha256_hex(data)
    path = root / kit_file(digest)
    if not path.exists():
        make_directory(path.parent)
        write_durably(path, data)
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
    """Return packed texts as an Arrow large_string array, without copying the text."""
    starts = np.ascontiguousarray(bounds - bounds[0])
    values = pa.py_buffer(np.ascontiguousarray(text))
    return pa.LargeStringArray.from_buffers(len(bounds) - 1, pa.py_buffer(starts), values)
