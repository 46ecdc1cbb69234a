"""The store on disk: layout, arrays, firings, claims, receipts, kit, proof. Home of zarr, numcodecs and fsspec."""

from .bundle import decode_bundle, encode_bundle, open_bundle
from .claims import exclusive, no_claims
from .files import prove_and_write
from .journal import Journal, run_reports
from .kit import kit_file, open_piece, pack_texts, write_piece
from .layout import FileProof, Layout, PassFile, StoreFile
from .location import Location
from .passes import PassWriter
from .reader import StoreReader
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
