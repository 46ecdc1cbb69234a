"""The firings of one (SAE, shard): a CSR matrix that anndata opens as it is (docs/format.md §6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from zarr.codecs import BloscCodec

from actstore.blocks import FiringsSpec, RowFirings

from .bundle import decode_bundle, encode_bundle

__all__ = ["decode_firings", "encode_firings", "firings_values", "index_dtype"]

# Of floats with few bits of mantissa, bits of like place compress best; of increasing ids, their high bytes.
CODECS = {
    "data": BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
    "indices": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
}


def index_dtype(n_features: int) -> np.dtype[Any]:
    """Return the smallest unsigned type that holds `n_features - 1`."""
    return np.min_scalar_type(max(0, n_features - 1))


def encode_firings(spec: FiringsSpec, firings: RowFirings) -> bytes:
    """Return the file of one shard's firings; activations are stored as given (rounding is the extractor's)."""
    attributes = {
        "encoding-type": "csr_matrix",
        "encoding-version": "0.1.0",
        "shape": [firings.n_rows, spec.n_features],
        "sae": spec.sae,
    }
    return encode_bundle(
        {
            "data": (firings.activations.astype(np.float32, copy=False), ("firing",)),
            "indices": (firings.features.astype(index_dtype(spec.n_features)), ("firing",)),
            "indptr": (firings.indptr.astype(np.int64, copy=False), ("row_bound",)),
        },
        attributes,
        codecs=CODECS,
    )


def decode_firings(data: bytes, name: str) -> RowFirings:
    """Return the firings in a shard's file; raises CorruptStore where it is damaged."""
    arrays, _ = decode_bundle(data, name)
    return RowFirings(arrays["indptr"], arrays["indices"], arrays["data"])


def firings_values(firings: RowFirings, n_features: int) -> list[npt.NDArray[Any]]:
    """Return the arrays whose bytes make a shard's value digest, in order."""
    return [firings.indptr.astype("<i8"), firings.features.astype(index_dtype(n_features)), firings.activations]
