"""The index: immutable DuckDB parts derived from the store's truth, and the limited path by which SQL reads them."""

from .build import Progress, build_index
from .catalog import CURRENT, EMPTY, Catalog, Cover, Part, load_catalog, read_catalog
from .compaction import MAX_PARTS, compact
from .connection import Answer, Connection, open_index, plain_connection
from .functions import SqlFunction
from .schema import TABLES
from .source import Segment, Source
from .upkeep import find_orphans, gc_index, verify_index

__all__ = [
    "CURRENT",
    "EMPTY",
    "MAX_PARTS",
    "TABLES",
    "Answer",
    "Catalog",
    "Connection",
    "Cover",
    "Part",
    "Progress",
    "Segment",
    "Source",
    "SqlFunction",
    "build_index",
    "compact",
    "find_orphans",
    "gc_index",
    "load_catalog",
    "open_index",
    "plain_connection",
    "read_catalog",
    "verify_index",
]
