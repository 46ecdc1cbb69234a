"""Building the index: what the catalog lacks is made as new parts, several at once, then the catalog changes at once.

What is already covered is left as it is, so indexing while extraction runs costs what is new. A part whose shards
have other receipts now (an artifact was dropped and made again) is left out and its shards are made again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from threading import Lock as ThreadLock
from typing import Any

import numpy as np
import pyarrow as pa

from actstore.sealed import digest_of, sha256_hex

from .catalog import Catalog, Cover, Lock, Names, Part, publish, read_catalog
from .compaction import MAX_PARTS, compact_parts
from .feature_parts import Block, Summary, content_of_features, write_features
from .firing_parts import write_firings
from .parts import PartWriter, Workshop
from .row_tables import RowJob, row_jobs
from .schema import PART_TABLES, SMALL_TABLES, TABLES
from .source import Segment, Source
from .upkeep import intact

__all__ = ["Progress", "build_index"]

Progress = Callable[[str, int, int], None]  # what is being indexed, shards of it done, shards of it in all

MAX_PART_ROWS = 64_000_000
SIGNAL_SECONDS = 0.2
BYTES_PER_JOB = 1 << 30  # of the memory for building: with less, the firings of an SAE would come in many parts


def build_index(
    source: Source,
    directory: Path,
    *,
    memory_bytes: int = 2 << 30,
    progress: Progress | None = None,
    lock: Lock | None = None,
    compact: bool = False,
    prove: bool = False,
) -> Catalog:
    """Index every shard that is done, as new parts beside the present ones, and return the current catalog.

    As many parts are made at once as there are cores, and GB in `memory_bytes`; `progress` is called by one thread at
    a time. The caller keeps other builds and `gc_index` away meanwhile (`index.lock`): parts that no catalog names yet
    look like orphans. `lock` is entered only while the catalog changes. `compact` also joins parts where a kind has
    more than `MAX_PARTS` of one subject. Parts whose files are gone or of another length are made anew; `prove` reads
    every part, and makes anew what is damaged. Where nothing is new the catalog stays as it is; parts of an older
    format are all made again.
    Raises StoreBusy where another process changed the index meanwhile, NoSpace, CorruptStore.
    """
    directory.mkdir(parents=True, exist_ok=True)
    before = read_catalog(directory, remake=True)
    n_threads = max(1, min(os.cpu_count() or 1, memory_bytes // BYTES_PER_JOB))
    n_saes = len(source.tables().get("saes", []))
    workshop = Workshop(directory, Names(directory, before), memory_bytes // max(1, min(n_threads, n_saes)))
    try:
        standing = intact(directory, before, prove=prove)
        parts = _Build(source, standing, workshop, progress or _quiet).parts(compact, n_threads)
        if list(before.parts) == parts:
            return before
        return publish(directory, before, parts, workshop.names, lock)
    except BaseException:
        workshop.discard()
        raise


class _Build:
    """One run: `parts` makes the parts of the next catalog, and keeps old ones where they still hold."""

    def __init__(self, source: Source, before: Catalog, workshop: Workshop, progress: Progress) -> None:
        self.source = source
        self.before = before
        self.workshop = workshop
        self.small = source.tables()
        self._progress = progress
        self._snapshot: dict[str, Mapping[int, str]] = {}
        self._one_at_a_time = ThreadLock()

    def parts(self, compact: bool, n_threads: int) -> list[Part]:
        """Return the parts in a fixed order, made by so many threads; an error ends them all."""
        with ThreadPoolExecutor(n_threads) as pool:
            try:
                made = [pool.submit(_parts_of, job) for job in self._jobs(compact)]
                # Waiting without an end can miss a signal that comes as it begins.
                while not (failed := [one for one in made if one.done() and one.exception()]):
                    if not wait(made, SIGNAL_SECONDS, FIRST_EXCEPTION).not_done:
                        break
                return [part for one in failed or made for part in one.result()]
            except BaseException:
                self.workshop.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _jobs(self, compact: bool) -> Iterator[Callable[[], Iterable[Part]]]:
        yield self._core
        yield self._vocabulary
        yield from (partial(self._documents, segment) for segment in self.source.segments())
        yield from (partial(self._rows, job, compact) for job in row_jobs(self.source))
        for coder in self.small.get("saes", []):
            yield partial(self._sae, str(coder["sae"]), int(coder["width"]), compact)

    def progress(self, what: str, n_done: int, n_all: int) -> None:
        with self._one_at_a_time:
            self._progress(what, n_done, n_all)

    def done(self, artifact: str) -> Mapping[int, str]:
        """Return one snapshot of what is done: asked once, and the same for all that is made from an artifact."""
        with self._one_at_a_time:
            if artifact not in self._snapshot:
                self._snapshot[artifact] = self.source.done(artifact)
            return self._snapshot[artifact]

    def _core(self) -> Iterator[Part]:
        rows = {table: _spelled(table, self.small.get(table, [])) for table in SMALL_TABLES}
        yield self._by_content("core", "", digest_of(rows), lambda writer: _append_small(writer, rows))

    def _vocabulary(self) -> Iterator[Part]:
        texts = self.source.vocabulary().cast(pa.string())
        table = pa.table({"token_id": np.arange(len(texts), dtype=np.int32), "token": texts})
        content = sha256_hex("\0".join(texts.to_pylist()).encode())
        yield self._by_content("vocabulary", "", content, lambda writer: writer.append("vocabulary", table))

    def _documents(self, segment: Segment) -> Iterator[Part]:
        content = digest_of([segment.first_doc, segment.n_docs, segment.first_seq, segment.n_seqs, segment.first_shard])

        def append(writer: PartWriter) -> None:
            for batch in self.source.documents(segment.segment):
                writer.append("documents", pa.Table.from_batches([batch]).select(list(TABLES["documents"])))
            writer.append("sequences", self._sequences(segment))

        yield self._by_content("documents", str(segment.segment), content, append)

    def _sequences(self, segment: Segment) -> pa.Table:
        doc, row, n_tokens = self.source.sequences(segment.segment).T
        seq = segment.first_seq + np.arange(len(doc), dtype=np.int64)
        return pa.table({"seq": seq, "doc": doc, "row": row, "n_tokens": n_tokens})

    def _by_content(self, kind: str, subject: str, content: str, append: Callable[[PartWriter], None]) -> Part:
        """Return the present part where it was made from the same content, else a new one."""
        for part in self.before.select(kind, subject):
            if part.facts.get("content") == content:
                return part
        with self.workshop.writing(kind, ".".join(filter(None, (kind, subject)))) as writer:
            append(writer)
        return self.workshop.finish(kind, subject, writer, facts={"content": content})

    def _present(self, kind: str, subject: str, done: Mapping[int, str]) -> tuple[list[Part], list[int]]:
        """Return the parts that still hold, and the shards that are done and in none of them."""
        kept = [part for part in self.before.select(kind, subject) if all(cover.holds(done) for cover in part.covers)]
        covered = frozenset[int]().union(*(part.shards for part in kept))
        return kept, sorted(done.keys() - covered)

    def _rows(self, job: RowJob, compact: bool) -> list[Part]:
        done = self.done(job.artifact)
        parts, missing = self._present(job.kind, job.subject, done)
        n_shards = max(MAX_PART_ROWS // self.source.shard_rows, 1)
        for start in range(0, len(missing), n_shards):
            parts.append(self._row_part(job, missing[start : start + n_shards], done))
        return self._compacted(parts, compact)

    def _row_part(self, job: RowJob, shards: Sequence[int], done: Mapping[int, str]) -> Part:
        with self.workshop.writing(job.kind, f"{job.stem}.{shards[0]}-{shards[-1] + 1}") as writer:
            for n_done, shard in enumerate(shards, 1):
                for table, rows in job.tables(shard).items():
                    writer.append(table, rows)
                self.progress(" ".join(filter(None, (job.kind, job.subject))), n_done, len(shards))
        return self.workshop.finish(job.kind, job.subject, writer, [Cover.of(done, shards)])

    def _sae(self, sae: str, width: int, compact: bool) -> Iterator[Part]:
        parts, known = self._firings(sae, width)
        firings = self._compacted(parts, compact)
        yield from firings
        logits = self.source.feature_logits(sae)
        if not firings and logits is None:
            return
        content = content_of_features(firings, logits)
        present = [part for part in self.before.select("features", sae) if part.facts.get("content") == content]
        yield present[0] if present else write_features(self.workshop, sae, width, firings, logits, known)

    def _firings(self, sae: str, width: int) -> tuple[list[Part], Sequence[Summary | Block]]:
        """Return the firings parts, and what `features` says of them where one new part is all there is."""
        done = self.done(f"firings/{sae}")
        parts, missing = self._present("firings", sae, done)
        n_done, known = 0, []
        for part, summaries in write_firings(
            self.workshop, self.source, sae, width, {one: done[one] for one in missing}
        ):
            n_done += len(part.shards)
            self.progress(f"firings {sae}", n_done, len(missing))
            known = [] if parts else summaries
            parts.append(part)
        return parts, known

    def _compacted(self, parts: list[Part], compact: bool) -> list[Part]:
        return compact_parts(self.workshop, parts) if compact and len(parts) > MAX_PARTS else parts


def _parts_of(job: Callable[[], Iterable[Part]]) -> list[Part]:
    return list(job())


def _append_small(writer: PartWriter, rows: Mapping[str, list[dict[str, Any]]]) -> None:
    for table in PART_TABLES["core"]:
        types = pa.schema([(column, _ARROW[kind]) for column, kind in TABLES[table].items()])
        writer.append(table, pa.Table.from_pylist(rows[table], types))


def _spelled(table: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with every column of the table, texts and JSON as text; what is missing is NULL."""
    for row in rows:
        assert row.keys() <= TABLES[table].keys(), f"{table} has no columns {row.keys() - TABLES[table].keys()}"
    return [{column: _spell(kind, row.get(column)) for column, kind in TABLES[table].items()} for row in rows]


def _spell(kind: str, value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return None  # a check that gave no number
    if kind == "JSON":
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    return str(value) if kind == "VARCHAR" else value


_ARROW = {
    "VARCHAR": pa.string(),
    "JSON": pa.string(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
}


def _quiet(what: str, n_done: int, n_all: int) -> None:
    """Say nothing."""
