"""Compaction: many small parts of one subject become few, with the same content.

The largest parts stay as they are and the rest are joined, so that what is written again stays in proportion to what
is new. Firings are joined feature block by feature block, never by one ORDER BY over everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path

import duckdb

from .attaching import attach_parts
from .catalog import Catalog, Cover, Lock, Names, Part, publish, read_catalog
from .engine import translate_building
from .feature_parts import Block, attach_firings, block_firings, feature_blocks, fetch_firings, sorted_firings
from .firing_blocks import Firings, append_firings, firing_types
from .parts import PartWriter, Workshop
from .schema import PART_TABLES, quote_name

__all__ = ["MAX_PARTS", "compact", "compact_parts"]

MAX_PARTS = 4


def compact(directory: Path, *, memory_bytes: int = 2 << 30, lock: Lock | None = None) -> Catalog:
    """Join parts so that no subject has more than `MAX_PARTS`, and return the current catalog.

    The content of every table stays the same; nothing is read but the index itself.
    Raises StoreBusy where another process changed the index meanwhile.
    """
    before = read_catalog(directory)
    workshop = Workshop(directory, Names(directory, before), memory_bytes)
    try:
        parts: list[Part] = []
        for _, group in groupby(before.parts, key=lambda part: (part.kind, part.subject)):
            parts.extend(compact_parts(workshop, list(group)))
        return publish(directory, before, parts, workshop.names, lock) if workshop.made else before
    except BaseException:
        workshop.discard()
        raise


def compact_parts(workshop: Workshop, parts: Sequence[Part]) -> list[Part]:
    """Return at most `MAX_PARTS` parts of one kind and subject that hold the same as `parts`."""
    if len(parts) <= MAX_PARTS:
        return list(parts)
    by_size = sorted(parts, key=lambda part: part.n_rows, reverse=True)
    joined = sorted(by_size[MAX_PARTS - 1 :], key=lambda part: min(part.shards))
    join = _join_firings if parts[0].kind == "firings" else _join_rows
    made = join(workshop, joined)
    gone = {part.name for part in joined}
    workshop.discard(gone)
    return [part for part in parts if part.name not in gone] + [made]


def _join_rows(workshop: Workshop, parts: Sequence[Part]) -> Part:
    kind, subject = parts[0].kind, parts[0].subject
    with workshop.writing(kind, _stem(parts)) as writer:
        attached = attach_parts(writer.connection, parts, lambda part: workshop.directory / part.name)
        for table, columns in PART_TABLES[kind].items():
            for alias, _ in attached:
                writer.append_query(table, f"SELECT {', '.join(map(quote_name, columns))} FROM {alias}.{table}")
    return workshop.finish(kind, subject, writer, _covers(parts))


def _join_firings(workshop: Workshop, parts: Sequence[Part]) -> Part:
    half = all(part.facts["activation"] == "half" for part in parts)
    with workshop.database(workshop.directory / _stem(parts)) as reading:
        attach_firings(reading, workshop, parts, coded=half)
        n_features, n_marked = _count_firings(reading)
        types = firing_types(half, sum(part.n_rows for part in parts), n_features, n_marked)
        with workshop.writing("firings", _stem(parts), **types) as writer:
            _append_firings(writer, reading, n_features, block_firings(workshop))
    plain_rows = sum(int(part.facts["plain_rows"]) for part in parts)
    facts = {"activation": "half" if half else "float", "plain_rows": plain_rows}
    return workshop.finish("firings", parts[0].subject, writer, _covers(parts), facts)


def _count_firings(reading: duckdb.DuckDBPyConnection) -> tuple[int, int]:
    """Return the number of features up to the last that fires, and of firings on rows that are not plain."""
    query = "SELECT coalesce(max(feature) + 1, 0), count(*) FILTER (NOT plain) FROM firings"
    with translate_building("the joined part"):
        n_features, n_marked = reading.execute(query).fetchone() or (0, 0)
    return int(n_features), int(n_marked)


def _append_firings(writer: PartWriter, reading: duckdb.DuckDBPyConnection, n_features: int, max_firings: int) -> None:
    blocks = feature_blocks(reading, n_features, max_firings, where="true")
    append_firings(writer, chain.from_iterable(_ordered(reading, block, max_firings) for block in blocks))


def _ordered(reading: duckdb.DuckDBPyConnection, block: Block, max_firings: int) -> Iterator[Firings]:
    """Yield the firings of a block in order: at once, or those of a feature that exceeds a block as DuckDB spills."""
    if block.n_firings <= max_firings:
        yield fetch_firings(reading, block).ordered()
    else:
        yield from sorted_firings(reading, block, max_firings)


def _stem(parts: Sequence[Part]) -> str:
    first, end = min(cover.first for cover in _covers(parts)), max(cover.end for cover in _covers(parts))
    names = [parts[0].kind, *filter(None, parts[0].subject.split("/"))]
    return ".".join([*names, f"{first}-{end}"])


def _covers(parts: Sequence[Part]) -> list[Cover]:
    return [cover for part in parts for cover in part.covers]
