"""The catalog: which parts make up the index, what they cover, and the atomic change from one to the next.

`catalog-<n>.json` lists immutable parts; `CURRENT` names one catalog. A part is durable before a catalog names it, a
catalog before `CURRENT` does. Whoever changes `CURRENT` must have started from what it says now.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise, starmap
from pathlib import Path
from threading import Lock as ThreadLock
from typing import Any, Self

from actstore.errors import CorruptStore, StoreBusy, UnsupportedFormat, explain
from actstore.sealed import digest_of, fsync_directory, seal, sha256_hex, unseal, write_durably

from .schema import PART_TABLES, SUBJECT_COLUMNS

__all__ = [
    "CATALOG_NAME",
    "CURRENT",
    "EMPTY",
    "Catalog",
    "Cover",
    "Lock",
    "Names",
    "Part",
    "load_catalog",
    "publish",
    "read_catalog",
]

CURRENT = "CURRENT"
FORMAT = 2  # 1: `heads` was a table of the core part
Lock = AbstractContextManager[object]
MAX_SHARDS = 10_000_000
CATALOG_NAME = re.compile(r"catalog-\d{1,18}\.json", re.ASCII)
# A name of one file in the index's own directory, whatever joins it to a path or a URL.
_PART_NAME = re.compile(r"[A-Za-z0-9][\w.@+=-]*\.duckdb", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUMBERED = re.compile(r"[.-](\d+)\.(?:duckdb|json)$")


@dataclass(frozen=True)
class Cover:
    """Shards that a part holds, with one digest over the receipts they had then.

    `runs` are [first, end), apart and in order; they stay runs, since a catalog from elsewhere may claim any number.
    """

    runs: tuple[tuple[int, int], ...]
    receipts: str

    def __post_init__(self) -> None:
        bounds = list(chain.from_iterable(self.runs))
        ordered = all(isinstance(bound, int) for bound in bounds) and all(a < b for a, b in pairwise([-1, *bounds]))
        if not bounds or not ordered or bounds[-1] > MAX_SHARDS or not _SHA256.fullmatch(self.receipts):
            raise CorruptStore(
                explain(f"The index says it covers {self.runs[:4]}…, which no part can", next_step=_REBUILD)
            )

    @property
    def first(self) -> int:
        return self.runs[0][0]

    @property
    def end(self) -> int:
        return self.runs[-1][1]

    @property
    def shards(self) -> Iterator[int]:
        return chain.from_iterable(starmap(range, self.runs))

    @classmethod
    def of(cls, done: Mapping[int, str], shards: Sequence[int]) -> Self:
        """Return the cover of `shards`; `done` has the digest of each one's receipt."""
        ordered = tuple(sorted(shards))
        return cls(_runs(ordered), digest_of([[shard, done[shard]] for shard in ordered]))

    def holds(self, done: Mapping[int, str]) -> bool:
        """Return whether every shard still has the receipt it had."""
        return all(shard in done for shard in self.shards) and Cover.of(done, list(self.shards)) == self


@dataclass(frozen=True)
class Part:
    """One immutable DuckDB file; `subject` is the SAE, `lens/site` or segment it is about."""

    kind: str
    subject: str
    name: str
    n_bytes: int
    sha256: str
    n_rows: int  # of its largest table
    covers: tuple[Cover, ...] = ()
    facts: Mapping[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n_names = len(SUBJECT_COLUMNS.get(self.kind, {}))
        sane = (
            self.kind in PART_TABLES
            and (not n_names or len(self.subject.split("/")) == n_names)
            and _PART_NAME.fullmatch(self.name)
            and _SHA256.fullmatch(self.sha256)
            and all(isinstance(number, int) and 0 <= number < 1 << 62 for number in (self.n_bytes, self.n_rows))
            and (self.kind != "attention" or (self.subject.isdecimal() and len(self.subject) < 10))
            and (self.kind != "firings" or self.facts["activation"] in ("half", "float"))
            and (self.kind != "firings" or isinstance(self.facts["plain_rows"], int))
        )
        if not sane:
            raise CorruptStore(explain(f"The index lists {self.name!r}, which is no part of one", next_step=_REBUILD))

    @property
    def shards(self) -> frozenset[int]:
        return frozenset(chain.from_iterable(cover.shards for cover in self.covers))

    def to_json(self) -> dict[str, Any]:
        """Return the part as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Return the part that `to_json` wrote; raises CorruptStore for what no part can be."""
        covers = tuple(
            Cover(tuple((first, end) for first, end in cover["runs"]), cover["receipts"]) for cover in body["covers"]
        )
        return cls(**{**body, "covers": covers})


@dataclass(frozen=True)
class Catalog:
    """One state of the index: its parts. `next_number` is larger than that of every file ever named."""

    number: int
    parts: tuple[Part, ...]
    next_number: int

    @property
    def name(self) -> str:
        return f"catalog-{self.number}.json"

    def select(self, kind: str, subject: str | None = None) -> list[Part]:
        """Return the parts of a kind, and of one subject where that is given."""
        return [part for part in self.parts if part.kind == kind and subject in (None, part.subject)]

    def to_bytes(self) -> bytes:
        """Return the sealed document that `from_bytes` reads."""
        parts = [part.to_json() for part in self.parts]
        return seal({"format": FORMAT, "number": self.number, "next_number": self.next_number, "parts": parts})

    @classmethod
    def from_bytes(cls, data: bytes, name: str, *, remake: bool = False) -> Self:
        """Return a catalog; with `remake`, one of an older format as if it had no parts, so that all are made again.

        Raises CorruptStore where a byte was changed, or for what no index has; UnsupportedFormat for another format.
        """
        body = unseal(data, name)
        try:
            found = int(body["format"])
            if found < FORMAT and remake:
                body = {**body, "parts": []}
            elif found != FORMAT:
                raise _other_format(name, found)
            return cls(int(body["number"]), tuple(map(Part.from_json, body["parts"])), int(body["next_number"]))
        except UnsupportedFormat:
            raise
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CorruptStore(explain(f"{name} is sealed but is no catalog", next_step=_REBUILD)) from None


EMPTY = Catalog(0, (), 1)


def load_catalog(read: Callable[[str], bytes], *, remake: bool = False) -> Catalog:
    """Return the current catalog, `EMPTY` where there is none; `read` returns the bytes of a file of the index.

    `remake` is that of `from_bytes`. Raises CorruptStore where `CURRENT` or the catalog it names is missing or changed,
    UnsupportedFormat where another version of actstore made it.
    """
    try:
        current = unseal(read(CURRENT), CURRENT)
    except FileNotFoundError:
        return EMPTY
    name = str(current.get("catalog"))
    if not CATALOG_NAME.fullmatch(name):
        raise CorruptStore(explain(f"{CURRENT} names {name!r}, which is no catalog", next_step=_REBUILD))
    try:
        data = read(name)
    except FileNotFoundError:
        raise CorruptStore(explain(f"{CURRENT} names {name}, which is missing", next_step=_REBUILD)) from None
    if sha256_hex(data) != current.get("sha256"):
        raise CorruptStore(explain(f"{name} is not the file that {CURRENT} names", next_step=_REBUILD))
    return Catalog.from_bytes(data, name, remake=remake)


def read_catalog(directory: Path, *, remake: bool = False) -> Catalog:
    """Return the current catalog of a local index; as `load_catalog`."""
    return load_catalog(lambda name: (directory / name).read_bytes(), remake=remake)


def publish(directory: Path, before: Catalog, parts: Sequence[Part], names: Names, lock: Lock | None) -> Catalog:
    """Make `parts` the current index, durably, if `before` still is.

    Raises StoreBusy where another process changed the index meanwhile; nothing is changed then.
    """
    with lock or nullcontext():
        if read_catalog(directory, remake=True) != before:
            raise StoreBusy(_busy("another process changed it"))
        if lost := [part.name for part in parts if not (directory / part.name).is_file()]:
            raise StoreBusy(_busy(f"{lost[0]} was removed"))
        number = names.take(lambda number: f"catalog-{number}.json")[0]
        catalog = Catalog(number, tuple(parts), names.next_number)
        write_durably(directory / catalog.name, catalog.to_bytes())
        current = {"catalog": catalog.name, "sha256": sha256_hex(catalog.to_bytes())}
        write_durably(directory / CURRENT, seal(current))
    return catalog


class Names:
    """Gives out file names of the index; none is given twice, in any process, at any time."""

    def __init__(self, directory: Path, catalog: Catalog) -> None:
        self.directory = directory
        taken = [int(found[1]) for path in directory.iterdir() if (found := _NUMBERED.search(path.name))]
        self._one_at_a_time = ThreadLock()
        self.next_number = max([catalog.next_number, *(number + 1 for number in taken)])

    def take(self, spell: Callable[[int], str]) -> tuple[int, Path]:
        """Return the next free number and its path; the name is taken by an empty file, made exclusively."""
        while True:
            with self._one_at_a_time:
                number, self.next_number = self.next_number, self.next_number + 1
            path = self.directory / spell(number)
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            fsync_directory(self.directory)
            return number, path


def _runs(shards: Sequence[int]) -> tuple[tuple[int, int], ...]:
    starts = [0] + [place + 1 for place, (one, other) in enumerate(pairwise(shards)) if other != one + 1]
    ends = [*starts[1:], len(shards)]
    return tuple((shards[start], shards[end - 1] + 1) for start, end in zip(starts, ends, strict=True) if shards)


def _other_format(name: str, found: int) -> UnsupportedFormat:
    older = "run `actstore index` on the store: the index is made anew from the arrays"
    newer = "install a newer actstore: pip install --upgrade actstore"
    return UnsupportedFormat(
        explain(
            f"The index was made by another version of actstore ({name} has format {found})",
            accepted=f"format {FORMAT}",
            next_step=older if found < FORMAT else newer,
        )
    )


def _busy(why: str) -> str:
    return explain(f"The index was not changed: {why} while it was being built", next_step="run `actstore index` again")


_REBUILD = "remove the directory `index` of the store and run `actstore index`; everything in it is derived"
