"""`Store`: the one facade that notebooks, command line and service call."""

from __future__ import annotations

import atexit
import shlex
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from .errors import CorruptStore, MissingInput, QueryError, UnknownName, explain, unknown_name
from .index import Catalog, Connection, Part, load_catalog, open_index, plain_connection
from .lenses import Functions
from .matrices import Activations, SiteView
from .named import named_query
from .plots import Asked
from .progress import Report, silent
from .results import Result, distinct_names
from .store import StoreReader

if TYPE_CHECKING:
    import duckdb

    from .exports import Exported
    from .loader import RowLoader

__all__ = ["Activations", "SiteView", "Store"]

INDEX = "index"
Parameters = Sequence[Any] | Mapping[str, Any] | None
Opened = TypeVar("Opened")


class Store:
    """One store, opened for reading: a snapshot of what was there. Use it as a context manager, or close it."""

    def __init__(self, store: str | Path) -> None:
        """Open a store by path or fsspec URL; read-only, no torch.

        Raises MissingInput, UnsupportedFormat or CorruptStore where it cannot be read.
        """
        self.reader = StoreReader(store)
        self.url = str(store)
        self.functions = Functions(self.reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index's files, and forget which they are: asked again, the store reads the catalog of that time."""
        if "_connection" in self.__dict__:
            self._connection.close()
            del self.__dict__["_connection"]
        self.__dict__.pop("catalog", None)

    def __repr__(self) -> str:
        layout, model = self.reader.layout, self.reader.store.model["identity"]["name"]
        return f"<actstore {self.url}: {model}, {layout.n_docs} documents, {layout.n_rows} rows>"

    @cached_property
    def catalog(self) -> Catalog:
        """The index's catalog, as it was when it was first asked for; a newer one where its parts are gone.

        Raises MissingInput where the store was not indexed yet.
        """
        location = self.reader.location
        if not location.exists(f"{INDEX}/CURRENT"):
            raise MissingInput(
                explain(f"{self.url} has no index yet", next_step=f"build it: actstore index {shlex.quote(self.url)}")
            )

        def load() -> Catalog:
            return load_catalog(lambda name: location.read(f"{INDEX}/{name}"))

        try:
            return load()
        except CorruptStore:  # another process replaced CURRENT, and removed what it named, since we read it
            return load()

    @cached_property
    def _connection(self) -> Connection:
        opened = self._over_parts(open_index)
        weakref.finalize(self, opened.close)  # else an error that is kept until the end makes DuckDB tell of leaks
        return opened

    def _over_parts(self, opening: Callable[..., Opened]) -> Opened:
        """Return what `opening` makes of the catalog's parts, or of those that replaced them meanwhile.

        Raises CorruptStore where a part that the current catalog names is missing or damaged.
        """
        known, given = self.catalog, {"functions": self.functions.all(), "labels": self.reader.labels()}
        try:
            return opening(known, self._locate, **given)
        except CorruptStore:
            self.__dict__.pop("catalog", None)
            if self.catalog == known:
                raise
            return opening(self.catalog, self._locate, **given)

    def _index(self) -> tuple[Catalog, Connection]:
        connection = self._connection  # first: where parts are gone, it takes a newer catalog
        return self.catalog, connection

    def _locate(self, name: str) -> Path:
        part: Part = next(one for one in self.catalog.parts if one.name == name)
        return self.reader.location.fetch(f"{INDEX}/{name}", part.sha256)

    def sql(self, text: str, parameters: Parameters = None, *, limit: int | None = None) -> Result:
        """Return what one SQL statement says; `?` and `$name` are bound from `parameters`.

        Raises QueryError, with DuckDB's own words, where it is wrong or does more than read.
        """
        connection = self._connection
        try:
            answer = connection.sql(text, parameters, limit=limit)
        finally:
            if connection.has_ended:  # the next statement opens another
                self.close()
        return Result(distinct_names(answer.table), answer.truncated)

    def query(self, name: str, parameters: Mapping[str, Any] | None = None, *, limit: int | None = None) -> Result:
        """Return the answer of a named query.

        Raises UnknownName for an unknown query, SAE or site, QueryError for parameters that do not fit.
        """
        query = named_query(name)
        bound = query.bind(parameters or {})
        for table, remedy in query.needs:
            if not len(self.sql(f'SELECT 1 FROM "{table}" LIMIT 1')):
                raise QueryError(explain(f"The query {name!r} reads {table}, which is empty here", next_step=remedy))
        for parameter in query.parameters:
            if bound[parameter.name] is not None:
                self._must_exist(parameter.kind, bound[parameter.name], bound.get("sae"))
        statement, used = query.statement(bound)
        return replace(self.sql(statement, used, limit=limit), asked=self._asked(name, bound))

    def _asked(self, query: str, parameters: Mapping[str, Any]) -> Asked:
        model = self.reader.store.model["identity"]["name"]
        return Asked(query, parameters, f"{model}, {self.url.rstrip('/').rpartition('/')[2]}")

    def _must_exist(self, kind: str, value: Any, sae: str | None = None) -> None:
        """Raise UnknownName where a query is about what is not stored, with what is."""
        if kind == "feature" and sae is not None and not 0 <= value < self._width(sae):
            last = self._width(sae) - 1
            raise UnknownName(explain(f"There is no feature {value} of {sae}", accepted=f"0 to {last}"))
        if kind == "doc" and not 0 <= value < self.reader.layout.n_docs:
            last = self.reader.layout.n_docs - 1
            raise UnknownName(explain(f"There is no document {value}", accepted=f"documents 0 to {last}"))
        if kind == "row":
            self.reader.token_column("seq", np.array([min(max(value, -1), 1 << 62)]))  # raises where it is not there
        if kind == "layer":
            self._must_have_attention(value)
        if kind == "head" and not 0 <= value < self.reader.store.model["facts"]["n_heads"]:
            last = self.reader.store.model["facts"]["n_heads"] - 1
            raise UnknownName(explain(f"There is no head {value}", accepted=f"heads 0 to {last}"))
        if kind in ("sae", "site"):
            known = self.sites if kind == "site" else self.saes
            if value not in known:
                next_step = f"add it: actstore extract MODEL --into STORE --{kind} …"
                raise unknown_name(f"stored {'SAE' if kind == 'sae' else 'site'}", value, known, next_step=next_step)

    def _must_have_attention(self, layer: int) -> None:
        homes = [one.partition("/") for one in self.reader.layout.artifacts]
        known = {int(name) for home, _, name in homes if home == "attention"}
        known |= {row["layer"] for row in self.reader.sites if row["kind"] == "pattern"}
        if layer not in known:
            next_step = "add it: actstore extract MODEL --into STORE --attention-top K"
            raise unknown_name("layer of stored attention", str(layer), map(str, sorted(known)), next_step=next_step)

    def connect(self) -> duckdb.DuckDBPyConnection:
        """Return an ordinary DuckDB connection with the store's tables and functions, for tools that want one.

        It is yours: it may read and write files. The store itself is attached read-only.
        """
        opened = self._over_parts(plain_connection)
        atexit.register(_close, weakref.ref(opened))
        return opened

    def __getitem__(self, site: str) -> SiteView:
        self._must_exist("site", site)
        return SiteView(self.functions, site)

    @property
    def sites(self) -> list[str]:
        """Names of the stored sites."""
        return [row["site"] for row in self.reader.sites]

    @property
    def saes(self) -> list[str]:
        """Ids of the stored SAEs."""
        return [row["sae"] for row in self.reader.saes]

    def activations(self, sae: str) -> Activations:
        """Return the firings of an SAE as SciPy CSR matrices (row × feature), read a shard at a time."""
        self._must_exist("sae", sae)
        return Activations(self.reader, sae, self._width(sae))

    def _width(self, sae: str) -> int:
        return next(int(row["width"]) for row in self.reader.saes if row["sae"] == sae)

    def export(
        self, what: Sequence[str], *, format: str, out: str | Path, report: Report = silent, **options: Any
    ) -> Exported:
        """Write part of the store for other tools, to a file or directory that is not there yet.

        format: `parquet` (tables, SAE ids, `all`), `anndata` (one SAE; by="token" or "document", reduce="max"),
        `neuronpedia` (one SAE), `safetensors` (sites) or `npy` (one site; both plain=True, dtype="float32").
        Raises UnknownName, InvalidInput or MissingDependency; nothing is left behind then.
        """
        from .exports import Source, export

        source = Source(self.url, self.reader, self._index)
        return export(source, what, form=format, out=out, report=report, **options)

    def lens(
        self,
        lens: str = "logit",
        *,
        doc: int,
        k: int = 1,
        sites: str = "resid_*",
        folder: str | Path | None = None,
        allow_pt: bool = False,
    ) -> Result:
        """Return a lens at stored residual sites over a document: site, layer, pos, row, input, rank, token, logprob.

        "logit", or "tuned" with the `folder` of a tuned lens, published or fitted here; computed from the stored
        residual streams and the kit. Or the name of a tuned lens that was saved, as it was. Raises UnknownName for
        another lens, site or document, InvalidInput for a lens of another model, UnsupportedFormat for a folder that is
        not read.
        """
        saved = {row["lens"] for row in self.reader.tables()["lenses"]} - {"logit"}
        known = ["logit", *sorted(saved)] if folder is None else ["tuned"]
        if lens not in known:
            tuned = 'store.lens("tuned", doc=…, folder=…) with the folder of a tuned lens'
            what = "lens" if folder is None else "lens with a folder"
            raise unknown_name(what, lens, known, next_step=tuned if folder is None else "leave `folder` out")
        if folder is None:
            return self.query("logit_lens", {"doc": doc, "k": k, "sites": sites, "lens": lens})
        from .lenses.tuned import TunedLens, lens_table

        self._must_exist("doc", doc)
        place = self.sql("SELECT seq, pos, row, token AS input FROM tokens WHERE doc = ? ORDER BY row", [doc])
        opened = TunedLens.open(folder, allow_pt=allow_pt)
        asked = self._asked("logit_lens", {"doc": doc, "k": k, "sites": sites, "lens": lens})
        return Result(lens_table(self.functions, opened, sites, place.table, k), asked=asked)

    def loader(self, sites: str | Sequence[str], batch_rows: int = 4096, seed: int = 0, **options: Any) -> RowLoader:
        """Return a torch DataLoader over the rows of stored sites, shuffled, every row once an epoch.

        A batch is a float32 tensor (row, width); of several sites, or `with_rows=True`, a dict of aligned tensors by
        site and int64 `row`. Special, template and repeated tokens are left out, and filler always is.
        `state_dict` and `load_state_dict` resume exactly. Options, with those of torch's DataLoader: plain_only,
        with_rows, dtype, buffer_shards, drop_last, rank, world_size, num_workers; see `actstore.loader.make_loader`.
        Raises UnknownName for a site that is not stored, InvalidInput for numbers that cannot be.
        """
        from .loader import make_loader

        names = [sites] if isinstance(sites, str) else list(sites)
        for site in names:
            self._must_exist("site", site)
        return make_loader(self.reader, sites, batch_rows, seed, **options)


def _close(connection: weakref.ref[duckdb.DuckDBPyConnection]) -> None:
    """Close what was left open, as `Store._connection` is closed."""
    if (opened := connection()) is not None:
        opened.close()
