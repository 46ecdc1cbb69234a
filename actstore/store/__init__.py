"""The store on disk: layout, arrays, firings, claims, receipts, kit, proof. Home of zarr, numcodecs and fsspec."""

from typing import TYPE_CHECKING

from actstore.on_demand import on_demand

from .bundle import decode_bundle, encode_bundle, open_bundle
from .kit import kit_file, open_piece, pack_texts, write_piece
from .layout import FileProof, Layout, PassFile, StoreFile
from .location import Location
from .reader import StoreReader

if TYPE_CHECKING:
    from .claims import LOCK_SECONDS, at_work, exclusive, no_claims
    from .files import prove_and_write
    from .journal import Journal, last_runs, read_runs
    from .passes import PassWriter
    from .repair import GivenUp, give_up_damaged
    from .sweep import sweep_store
    from .verify import Verification, verify_store
    from .writer import StoreWriter

__all__ = [
    "LOCK_SECONDS",
    "FileProof",
    "GivenUp",
    "Journal",
    "Layout",
    "Location",
    "PassFile",
    "PassWriter",
    "StoreFile",
    "StoreReader",
    "StoreWriter",
    "Verification",
    "at_work",
    "decode_bundle",
    "encode_bundle",
    "exclusive",
    "give_up_damaged",
    "kit_file",
    "last_runs",
    "no_claims",
    "open_bundle",
    "open_piece",
    "pack_texts",
    "prove_and_write",
    "read_runs",
    "sweep_store",
    "verify_store",
    "write_piece",
]

# What only writes is imported when it is asked for: a question needs none of it, and waits for its imports.
__getattr__ = on_demand(
    __name__,
    {
        "LOCK_SECONDS": "claims",
        "at_work": "claims",
        "exclusive": "claims",
        "no_claims": "claims",
        "prove_and_write": "files",
        "Journal": "journal",
        "last_runs": "journal",
        "read_runs": "journal",
        "PassWriter": "passes",
        "GivenUp": "repair",
        "give_up_damaged": "repair",
        "sweep_store": "sweep",
        "Verification": "verify",
        "verify_store": "verify",
        "StoreWriter": "writer",
    },
)
