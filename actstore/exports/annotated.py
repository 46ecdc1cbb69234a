"""One SAE's firings as an AnnData file: tokens × features, or documents × features; `.h5ad` or `.zarr`.

- `X`: CSR, float32. Tokens: the activations that are stored. Documents: the sum, mean, max or count of a feature's
  firings over the document's plain rows; the mean is over all its plain rows, those without a firing too.
- `obs`: the columns of `tokens`, or those of `documents` less the text (`doc` leads back to it) with `n_plain`, the
  rows that were reduced. Names are the row's or the document's number.
- `var`: `feature` and its columns of `features`; `varm["histogram"]`; names are the feature's number.
- `uns["actstore"]`: model, sae, site, by, reduce.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actstore.errors import InvalidInput, MissingInput, explain
from actstore.index import TABLES
from actstore.progress import Report

from .frame import Frame
from .hierarchy import Hierarchy, encoded, new_hierarchy
from .reduction import REDUCTIONS, SparseRows, document_rows, token_rows
from .source import Source, must_be_one
from .target import Exported, exported, must_be_free, new_target

__all__ = ["BY", "export_anndata"]

BY = ("token", "document")
SUFFIXES = (".h5ad", ".zarr")


def export_anndata(
    source: Source, what: Sequence[str], out: Path, *, by: str = "token", reduce: str | None = None, report: Report
) -> Exported:
    """Write the firings of one SAE as AnnData to `out`, which ends in `.h5ad` or `.zarr`.

    `reduce`, one of sum, mean, max and count, belongs to `by="document"`.
    Raises UnknownName for an SAE that is not stored, InvalidInput for options that do not go together, MissingInput
    where the index lacks the SAE, MissingDependency without h5py.
    """
    sae = str(source.sae(must_be_one(what, "SAE", "an AnnData file"))["sae"])
    _check(source, sae, out, by, reduce)
    source.must_be_indexed(sae)
    with new_target(out) as partial, new_hierarchy(partial, out.suffix) as root:
        root.group("", encoded("anndata", "0.1.0"))
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns", "uns/actstore"):
            root.group(name, encoded("dict", "0.1.0"))
        for name, text in _facts(source, sae, by, reduce).items():
            root.scalar(f"uns/actstore/{name}", text)
        _write_features(source, sae, root)
        rows = token_rows(source.reader, sae) if by == "token" else document_rows(source.reader, sae, str(reduce))
        n_rows = _write_rows(source, sae, by, rows, root, report)
    return exported(out, n_rows)


def _check(source: Source, sae: str, out: Path, by: str, reduce: str | None) -> None:
    must_be_free(out)
    if out.suffix not in SUFFIXES:
        raise InvalidInput(explain(f"{out.name} is no name of an AnnData file", accepted="a path in .h5ad or .zarr"))
    if by not in BY:
        raise InvalidInput(explain(f"Rows by {by!r} are not known", accepted=", ".join(BY)))
    if (by == "document") != (reduce is not None):
        what = "Documents need a reduction" if by == "document" else "Tokens are not reduced"
        accepted = f"by document with a reduction: {', '.join(REDUCTIONS)}"
        next_step = "add --reduce max" if by == "document" else "add --by document, or leave out --reduce"
        raise InvalidInput(explain(what, accepted=accepted, next_step=next_step))
    if reduce is not None and reduce not in REDUCTIONS:
        raise InvalidInput(explain(f"The reduction {reduce!r} is not known", accepted=", ".join(REDUCTIONS)))
    done, total = len(source.reader.done(f"firings/{sae}")), source.reader.layout.n_shards
    if by == "document" and done < total:
        what = f"{sae} is stored over {done} of {total} shards: documents would be cut"
        raise InvalidInput(explain(what, next_step="finish the extraction, or export by token"))


def _facts(source: Source, sae: str, by: str, reduce: str | None) -> Mapping[str, str]:
    model = source.reader.store.model["identity"]["name"]
    return {"model": model, "sae": sae, "site": source.sae(sae)["site"], "by": by, "reduce": reduce or ""}


def _write_features(source: Source, sae: str, root: Hierarchy) -> None:
    columns = [name for name in TABLES["features"] if name not in ("sae", "histogram")]
    found = source.table("SELECT * FROM features WHERE sae = $sae ORDER BY feature", {"sae": sae})
    with Frame(source, root, "var", "features", columns) as frame:
        frame.append(found.column("feature").to_numpy().astype(np.int64), _columns(found))
    histogram = pc.list_flatten(found.column("histogram")).to_numpy().reshape(len(found), -1)
    root.matrix("varm/histogram", histogram)


def _write_rows(source: Source, sae: str, by: str, rows: Iterator[SparseRows], root: Hierarchy, report: Report) -> int:
    """Write `X` and `obs` together, block by block; return how many rows there are."""
    table = "tokens" if by == "token" else "documents"
    columns = [*(name for name in TABLES[table] if name != "text"), *(["n_plain"] if by == "document" else [])]
    total = len(source.reader.done(f"firings/{sae}"))
    root.sparse("X")
    at_most = sum(part.n_rows for part in source.index[0].select("firings", sae))
    index = "int32" if at_most < 1 << 31 else "int64"  # SciPy wants one type for both, and the smaller where it can
    with ExitStack() as stack:
        frame = stack.enter_context(Frame(source, root, "obs", table, columns))
        kinds = {"data": "float32", "indices": index, "indptr": index}
        data, indices, indptr = (stack.enter_context(root.plain(f"X/{name}", kind)) for name, kind in kinds.items())
        indptr.append(np.zeros(1))
        n_rows = n_firings = 0
        for done, block in enumerate(rows, start=1):
            data.append(block.values)
            indices.append(block.features)
            indptr.append(n_firings + np.cumsum(block.counts))
            frame.append(block.numbers, _observed(source, table, block))
            n_rows, n_firings = n_rows + len(block.counts), n_firings + len(block.values)
            report(f"exporting {sae}", min(done, total), total, "shards")
    root.shape("X", n_rows, int(source.sae(sae)["width"]))
    return n_rows


def _observed(source: Source, table: str, block: SparseRows) -> Mapping[str, pa.ChunkedArray]:
    """Return the columns of the index for the rows of a block.

    Raises MissingInput where the index lacks some of them.
    """
    first = int(block.numbers[0]) if len(block.numbers) else 0
    key = "row" if table == "tokens" else "doc"
    left_out = " EXCLUDE (text)" if table == "documents" else ""
    sql = f"SELECT *{left_out} FROM {table} WHERE {key} >= $first AND {key} < $end ORDER BY {key}"
    found = source.table(sql, {"first": first, "end": first + len(block.numbers)})
    if not np.array_equal(found.column(key).to_numpy(), block.numbers):
        what = f"The index of {source.url} lacks rows of {table}"
        raise MissingInput(explain(what, next_step=f"bring it up to date: actstore index {shlex.quote(source.url)}"))
    return {**_columns(found), "n_plain": pa.chunked_array([block.n_plain])}


def _columns(table: pa.Table) -> dict[str, pa.ChunkedArray]:
    return dict(zip(table.column_names, table.columns, strict=True))
