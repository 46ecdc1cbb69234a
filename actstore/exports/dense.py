"""Dense sites as one file: `.safetensors` (a tensor for every site) or `.npy`, rows in use and nothing else.

A tensor is (row, width), its rows in increasing order of the store's row numbers. Filler is left out, and with
`plain` also special, template and repeated rows: wherever the numbers are not 0, 1, 2, …, they lie beside the file in
`<file>.rows.npy`, int64 (row). Headers come first: how many rows there will be is known from the tokens.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from actstore.blocks import TOKEN_FIELDS, is_plain
from actstore.errors import InvalidInput, explain
from actstore.progress import Report
from actstore.recipe import QUANTISED

from .source import Source, must_be_one
from .target import Exported, exported, must_be_free, new_target

__all__ = ["export_npy", "export_safetensors"]

DTYPES: Mapping[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
TENSOR_DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # as the safetensors header spells them


def export_safetensors(
    source: Source, sites: Sequence[str], out: Path, *, plain: bool = False, dtype: str | None = None, report: Report
) -> Exported:
    """Write sites as tensors of their own names, each in its stored dtype (float32 for int8) or in `dtype`.

    All sites must be stored over the same shards. Raises UnknownName for a site that is not stored, InvalidInput where
    they cover different rows or `dtype` is neither float32 nor bfloat16.
    """
    dtypes = {site: _dtype(source, site, dtype) for site in sites}
    rows = _rows(source, sites, plain)
    header = _safetensors_header(source, dtypes, rows.count)
    return _write(source, dtypes, rows, out, header, report)


def export_npy(
    source: Source, sites: Sequence[str], out: Path, *, plain: bool = False, dtype: str | None = None, report: Report
) -> Exported:
    """Write one site as an array (row, width) of float32.

    Raises UnknownName for a site that is not stored, InvalidInput for several sites or for bfloat16, which numpy's
    format cannot say.
    """
    site = must_be_one(sites, "site", ".npy")
    chosen = _dtype(source, site, dtype)
    if chosen != "float32":
        raise InvalidInput(
            explain(
                f"{site} is {chosen}, which .npy cannot say",
                accepted="float32",
                next_step="add --dtype float32 (exact), or use --format safetensors",
            )
        )
    rows = _rows(source, [site], plain)
    header = _npy_header((rows.count, int(source.sites[site]["width"])), "<f4")
    return _write(source, {site: chosen}, rows, out, header, report)


def _dtype(source: Source, site: str, wanted: str | None) -> str:
    source.must_have_site(site)
    stored = str(source.sites[site]["dtype"])
    chosen = wanted or ("float32" if stored == QUANTISED else stored)
    if chosen not in DTYPES:
        raise InvalidInput(explain(f"The dtype {chosen!r} is not written", accepted=", ".join(DTYPES)))
    return chosen


@dataclass(frozen=True)
class _Rows:
    """Which rows are written: those in use of some shards, or only the plain ones of them."""

    source: Source
    shards: tuple[int, ...]
    plain: bool

    def numbers(self, shard: int) -> npt.NDArray[np.int64]:
        """Return the numbers of the rows of a shard that are written: int64 (row)."""
        return shard * self.source.reader.shard_rows + self.places(shard)

    def places(self, shard: int) -> npt.NDArray[np.int64]:
        """Return the places within a shard of the rows that are written: int64 (row)."""
        if not self.plain:
            return np.arange(self.source.reader.rows_used[shard], dtype=np.int64)
        flags = self.source.reader.matrix("corpus/tokens", shard)[:, TOKEN_FIELDS.index("flags")]
        return np.flatnonzero(is_plain(flags))

    @cached_property
    def count(self) -> int:
        """How many rows are written, all shards together."""
        return sum(len(self.places(shard)) for shard in self.shards)

    @cached_property
    def are_all(self) -> bool:
        """Whether they are numbered 0, 1, 2, …: then nothing needs to say their numbers."""
        ends = [int(numbers[-1]) for shard in self.shards if len(numbers := self.numbers(shard))]
        return not ends or ends[-1] + 1 == self.count


def _rows(source: Source, sites: Sequence[str], plain: bool) -> _Rows:
    covers = {site: tuple(sorted(source.reader.done(f"sites/{site}"))) for site in sites}
    shards = covers[sites[0]]
    for site, others in covers.items():
        if others != shards:
            what = f"{sites[0]} is stored over {len(shards)} shards and {site} over {len(others)}"
            raise InvalidInput(explain(what, next_step="finish the extraction, or export them one by one"))
    return _Rows(source, shards, plain)


def _safetensors_header(source: Source, dtypes: Mapping[str, str], n_rows: int) -> bytes:
    """Return the eight bytes of length and the JSON header, padded so that tensors begin at a multiple of eight."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "axes": "row, width", "written_by": "actstore"}}
    offset = 0
    for site, dtype in dtypes.items():
        shape = [n_rows, int(source.sites[site]["width"])]
        n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
        entries[site] = {
            "dtype": TENSOR_DTYPES[dtype],
            "shape": shape,
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    buffer = io.BytesIO()
    npy.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _write(
    source: Source, dtypes: Mapping[str, str], rows: _Rows, out: Path, header: bytes, report: Report
) -> Exported:
    """Write header, then tensor after tensor; where rows are left out, their numbers get their name first."""
    beside = out.with_name(f"{out.name}.rows.npy")
    must_be_free(beside)
    try:
        with new_target(out) as partial:
            with partial.open("xb") as file:
                file.write(header)
                for site, dtype in dtypes.items():
                    for values in _values(source, site, rows, report):
                        _append(file, values.astype(DTYPES[dtype], copy=False))
            if not rows.are_all:
                _write_numbers(rows, beside)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return exported(out, rows.count, *([] if rows.are_all else [beside]))


def _write_numbers(rows: _Rows, path: Path) -> None:
    with new_target(path) as partial, partial.open("xb") as file:
        file.write(_npy_header((rows.count,), "<i8"))
        for shard in rows.shards:
            _append(file, rows.numbers(shard).astype("<i8", copy=False))


def _values(source: Source, site: str, rows: _Rows, report: Report) -> Iterator[npt.NDArray[Any]]:
    """Yield the rows of a site that are written, shard by shard: (row, width) in the dtype that they are read in."""
    for done, shard in enumerate(rows.shards):
        report(f"exporting {site}", done, len(rows.shards), "shards")
        yield source.reader.matrix(f"sites/{site}", shard)[rows.places(shard)]
    report(f"exporting {site}", len(rows.shards), len(rows.shards), "shards")


def _append(file: BinaryIO, values: npt.NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
