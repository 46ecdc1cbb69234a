"""The store on disk: layout, arrays, firings, claims, receipts, kit, proof. Home of zarr, numcodecs and fsspec."""

from typing import TYPE_CHECKING

from actstore.on_demand import on_demand

from .bundle import decode_bundle, encode_bundle, open_bundle
from .kit import kit_file, open_piece, pack_texts, write_piece
from .layout import FileProof, Layout, PassFile, StoreFile
from .location import Location
from .reader import StoreReader

if TYPE_CHECKING:
    from .claims import exclusive, no_claims
    from .files import prove_and_write
    from .journal import Journal, run_reports
    from .passes import PassWriter
    from .sweep import sweep_store
    from .verify import Verification, verify_store
    from .writer import StoreWriter

__all__ = [
    "FileProof",
    "Journal",
    "Layout",
    "Location",
    "PassFile",
    "PassWriter",
    "StoreFile",
    "StoreReader",
    "StoreWriter",
    "Verification",
    "decode_bundle",
    "encode_bundle",
    "exclusive",
    "kit_file",
    "no_claims",
    "open_bundle",
    "open_piece",
    "pack_texts",
    "prove_and_write",
    "run_reports",
    "sweep_store",
    "verify_store",
    "write_piece",
]

# What only writes is imported when it is asked for: a question needs none of it, and waits for its imports.
__getattr__ = on_demand(
    __name__,
    {
        "exclusive": "claims",
        "no_claims": "claims",
        "prove_and_write": "files",
        "Journal": "journal",
        "run_reports": "journal",
        "PassWriter": "passes",
        "sweep_store": "sweep",
        "Verification": "verify",
        "verify_store": "verify",
        "StoreWriter": "writer",
    },
)
