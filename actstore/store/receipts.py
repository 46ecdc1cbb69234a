"""Reading what proves files: the layout, receipts, loose or sealed, manifests of the corpus (docs/format.md §4, §7)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Annotated, Any, get_args

from actstore.blocks import Segment
from actstore.errors import CorruptStore, explain

from .files import LAYOUT_FILE, manifest_file, receipt_file
from .layout import CORPUS_PASS, FileProof, Layout
from .location import Location
from .proved import damaged
from .shapes import Count, StoredPath, read_as, read_fields, refusing

__all__ = [
    "RECEIPT_NAME",
    "Receipt",
    "corpus_manifest",
    "load_corpus",
    "load_layout",
    "load_receipts",
    "lost",
    "pass_manifest",
    "proofs_of",
    "receipt_of",
]

RECEIPT_NAME = re.compile(r"(0|[1-9][0-9]{0,17})[.]json")

Receipt = Mapping[str, Any]


def load_layout(location: Location) -> Layout:
    """Return a store's layout, an empty one where tokenising has not ended; raises CorruptStore where it was lost."""
    try:
        return Layout.from_json(location.read_sealed(LAYOUT_FILE), f"{location.url}/{LAYOUT_FILE}")
    except FileNotFoundError:
        if set(location.names("passes")) - {CORPUS_PASS}:  # no pass begins before there is a layout
            raise damaged(LAYOUT_FILE, "it is missing, and passes are there") from None
        return Layout()


def load_corpus(location: Location, layout: Layout, shard_rows: int) -> list[dict[str, Any]]:
    """Return the manifest of every segment; raises CorruptStore where one is missing or was changed."""
    return [_corpus_segment(location, segment, shard_rows) for segment in layout.segments]


def _corpus_segment(location: Location, segment: Segment, shard_rows: int) -> dict[str, Any]:
    name = manifest_file(CORPUS_PASS, segment.segment)
    try:
        return corpus_manifest(location.read_sealed(name), name, segment, shard_rows)
    except FileNotFoundError:
        raise damaged(name, "it is missing") from None


def load_receipts(location: Location, layout: Layout, pass_id: str) -> dict[int, Receipt]:
    """Return the receipts of a pass by shard, in order.

    Raises CorruptStore where one was changed, or a manifest that was written is not there.
    """
    found: dict[int, Receipt] = {}
    # Loose receipts first: one that is sealed and removed in between is then found in the manifest.
    for match in filter(None, map(RECEIPT_NAME.fullmatch, location.names(f"passes/{pass_id}/receipts"))):
        file, shard = receipt_file(pass_id, int(match[1])), int(match[1])
        with suppress(FileNotFoundError):
            if shard < layout.n_shards:  # else of a segment that was added since
                found[shard] = receipt_of(location.read_sealed(file), file, pass_id, shard)
    for segment in layout.segments:
        name = manifest_file(pass_id, segment.segment)
        if location.exists(name):
            found |= pass_manifest(location.read_sealed(name), name, pass_id, segment)
        elif segment.segment in layout.sealed.get(pass_id, ()):
            raise lost(name)
    return dict(sorted(found.items()))


def lost(manifest: str) -> CorruptStore:
    """Return the error for a manifest that was written and is not there: its shards are not to be made again."""
    return CorruptStore(
        explain(
            f"{manifest} is missing, which says what is stored of a whole segment",
            next_step="put it back from a copy of the store, or drop all that this pass made (`actstore drop`) and "
            "make it again; `actstore verify` names everything that is damaged",
        )
    )


def receipt_of(body: Receipt, name: str, pass_id: str, shard: int) -> Receipt:
    """Return a shard's receipt as it is; raises CorruptStore where it is another's, or says what none can say."""
    with refusing(name):
        if (body.get("pass"), body.get("shard")) != (pass_id, shard):
            raise ValueError("the receipt of another shard or pass")
        read_fields({"n_rows": Count, "provenance": Mapping[str, Any]}, body, "receipt")
    _refuse_other_files(body, name)
    return body


def pass_manifest(body: Mapping[str, Any], name: str, pass_id: str, segment: Segment) -> dict[int, Receipt]:
    """Return the receipts that the manifest of a pass's segment holds, by shard; raises as `receipt_of`."""
    shards = range(segment.first_shard, segment.first_shard + segment.n_shards)
    with refusing(name):
        receipts = read_as(Mapping[str, Mapping[str, Any]], body.get("receipts"), "receipts")
        if len(receipts) != len(shards) or not all(str(shard) in receipts for shard in shards):
            raise ValueError(f"receipts of other shards than {shards.start} to {shards.stop - 1}")
    return {shard: receipt_of(receipts[str(shard)], name, pass_id, shard) for shard in shards}


def corpus_manifest(body: Mapping[str, Any], name: str, segment: Segment, shard_rows: int) -> dict[str, Any]:
    """Return the manifest of a segment of the corpus as it is; raises CorruptStore where it says what none can say."""
    of_a_shard = Annotated[int, range(shard_rows + 1)]
    with refusing(name):
        if read_as(Segment, body.get("segment"), "segment") != segment:
            raise ValueError("another segment than the layout's")
        used = read_as(tuple[of_a_shard, ...], body.get("rows_used"), "rows_used")
        if (len(used), sum(used)) != (segment.n_shards, segment.n_rows):
            raise ValueError(f"{sum(used)} rows in {len(used)} shards, of {segment.n_rows} in {segment.n_shards}")
        described = read_as(Mapping[str, Any], body.get("describe"), "describe")
        read_fields(_DESCRIBE, {**_UNSAID, **described}, "describe")
    _refuse_other_files(body, name)
    return dict(body)


_DESCRIBE = {
    "documents_digest": str,
    "max_tokens": Count | None,
    "replaced_surrogates": Count,
    "empty_documents": Count,
    "roles": tuple[str, ...],
    "chat_template": str | None,
}
_UNSAID: dict[str, Any] = {"replaced_surrogates": 0, "empty_documents": 0, "roles": []}


def proofs_of(body: Mapping[str, Any], name: str) -> dict[str, FileProof]:
    """Return what a receipt or manifest says of its files, by path; raises CorruptStore where it cannot be so."""
    with refusing(name):
        proofs: dict[str, FileProof] = read_as(Mapping[StoredPath, FileProof], body.get("files"), "files")
    return proofs


def _refuse_other_files(body: Mapping[str, Any], name: str) -> None:
    """Raise as `proofs_of`; there are as many proofs as files, so those of a whole shard are looked at together."""
    files = body.get("files")
    if not (isinstance(files, dict) and _are_written_so(files)):
        proofs_of(body, name)


def _are_written_so(files: Mapping[str, Any]) -> bool:
    """Return whether all proofs are as actstore writes them; others are looked at one by one."""
    proofs = list(files.values())
    paths = "".join([f"{path}\n" for path in files])
    if set(map(type, proofs)) - {dict} or not _PATHS(paths) or paths.count("\n") != len(files):
        return False
    if any(proof.keys() != _WRITTEN for proof in proofs):
        return False
    sizes, digests = [proof["bytes"] for proof in proofs], [proof["sha256"] for proof in proofs]
    digests += [one for proof in proofs for one in (proof["values_sha256"], proof["chunks_sha256"]) if one is not None]
    if set(map(type, sizes)) - {int} or set(map(type, digests)) - {str} or set(map(len, digests)) - {64}:
        return False
    return all(map(_COUNTS.__contains__, sizes)) and _HEX("".join(digests)) is not None


_WRITTEN = {one.name for one in fields(FileProof)}
_COUNTS = get_args(Count)[1]
_PATHS = re.compile(f"(?:{get_args(StoredPath)[1]}\n)*").fullmatch
_HEX = re.compile("[0-9a-f]*").fullmatch
