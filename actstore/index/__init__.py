"""The index: immutable DuckDB parts derived from the store's truth, and the limited path by which SQL reads them."""

from typing import TYPE_CHECKING

from actstore.on_demand import on_demand

from .catalog import CURRENT, EMPTY, Catalog, Cover, Part, load_catalog, read_catalog
from .connection import Answer, Connection, open_index, plain_connection
from .functions import SqlFunction
from .schema import TABLES
from .source import Segment, Source

if TYPE_CHECKING:
    from .build import Progress, build_index
    from .compaction import MAX_PARTS, compact
    from .upkeep import find_orphans, forget_damaged, gc_index, verify_index

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
    "forget_damaged",
    "gc_index",
    "load_catalog",
    "open_index",
    "plain_connection",
    "read_catalog",
    "verify_index",
]

# What only builds is imported when it is asked for: a question needs none of it, and waits for its imports.
__getattr__ = on_demand(
    __name__,
    {
        "Progress": "build",
        "build_index": "build",
        "MAX_PARTS": "compaction",
        "compact": "compaction",
        "find_orphans": "upkeep",
        "forget_damaged": "upkeep",
        "gc_index": "upkeep",
        "verify_index": "upkeep",
    },
)
