"""What exports read: one snapshot of a store, and its index as a stream of batches."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from actstore.errors import InvalidInput, MissingInput, explain, unknown_name
from actstore.index import Catalog, Connection
from actstore.store import StoreReader

__all__ = ["Source", "must_be_one"]

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A store as exports see it; the index is opened when the first table is asked for."""

    url: str
    reader: StoreReader
    open_index: Callable[[], tuple[Catalog, Connection]]

    @cached_property
    def index(self) -> tuple[Catalog, Connection]:
        """The catalog and a connection over its parts; raises MissingInput where the store was not indexed yet."""
        return self.open_index()

    def batches(self, sql: str, parameters: Parameters | None = None) -> Iterator[pa.RecordBatch]:
        """Yield what one statement says, tens of thousands of rows at a time."""
        with self.index[1].stream(sql, parameters or {}) as reader:
            yield from reader

    def table(self, sql: str, parameters: Parameters | None = None) -> pa.Table:
        """Return what one statement says as a whole: for answers that do not grow with the corpus."""
        with self.index[1].stream(sql, parameters or {}) as reader:
            return reader.read_all()

    @cached_property
    def saes(self) -> Mapping[str, Mapping[str, Any]]:
        """The stored SAEs, by id, as rows of the table `saes`."""
        return {row["sae"]: row for row in self.reader.saes}

    @cached_property
    def sites(self) -> Mapping[str, Mapping[str, Any]]:
        """The stored sites, by name, as rows of the table `sites`."""
        return {row["site"]: row for row in self.reader.sites}

    def sae(self, name: str) -> Mapping[str, Any]:
        """Return the row of `saes` of an SAE; raises UnknownName, saying what is stored."""
        if name not in self.saes:
            next_step = "add it: actstore extract MODEL --into STORE --sae SOURCE"
            raise unknown_name("stored SAE", name, self.saes, next_step=next_step)
        return self.saes[name]

    def must_have_site(self, name: str) -> None:
        """Raise UnknownName, saying what is stored, unless the site is."""
        if name not in self.sites:
            next_step = f"add it: actstore extract MODEL --into STORE --site {name}"
            raise unknown_name("stored site", name, self.sites, next_step=next_step)

    def must_be_indexed(self, sae: str) -> None:
        """Raise MissingInput unless the index has the firings of an SAE over every shard that is done."""
        done = self.reader.done(f"firings/{sae}")
        parts = self.index[0].select("firings", sae)
        if {shard for part in parts for shard in part.shards} != set(done):
            what = f"The index of {self.url} does not have all firings of {sae} that are stored"
            raise MissingInput(explain(what, next_step=f"bring it up to date: actstore index {shlex.quote(self.url)}"))


def must_be_one(what: Iterable[str], kind: str, form: str) -> str:
    """Return the only name of `what`; raises InvalidInput where there are several."""
    names = list(what)
    if len(names) != 1:
        raise InvalidInput(
            explain(
                f"{len(names)} things were asked for ({', '.join(names)}), and {form} holds one",
                accepted=f"one {kind}",
                next_step="export them one by one",
            )
        )
    return names[0]
