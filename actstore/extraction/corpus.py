"""The corpus of an extraction: read, tokenised and stored before the model runs, or recognised in the store."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actstore.blocks import Segment
from actstore.corpus import (
    Chats,
    CorpusBatch,
    Document,
    DocumentsDigest,
    Roles,
    TokenizerHandle,
    Window,
    lay_out,
    read_documents,
)
from actstore.errors import RecipeMismatch, explain
from actstore.progress import Report
from actstore.store import StoreReader, StoreWriter

from .request import Request

__all__ = ["count_rows", "digest_of_dataset", "store_segment"]


@dataclass
class _Watch:
    """Sees documents and batches go by: what a segment says of itself is known when the last one has passed."""

    report: Report
    doing: str
    max_tokens: int | None
    roles: Roles = field(default_factory=Roles)
    template_digest: str | None = None
    digest: DocumentsDigest = field(default_factory=DocumentsDigest)
    n_documents: int = 0
    n_replaced: int = 0
    n_empty: int = 0
    n_rows: int = 0
    n_shards: int = 0

    def batches(self, batches: Iterable[CorpusBatch]) -> Iterator[CorpusBatch]:
        for batch in batches:
            for document in batch.documents:
                self.digest.update(document)
            self.n_documents += len(batch.documents)
            self.n_replaced += sum(document.n_replaced for document in batch.documents)
            self.n_empty += sum(document.n_tokens == 0 for document in batch.documents)
            self.n_rows += int(batch.sequences[:, 2].sum())
            self.n_shards += len(batch.shards)
            self.report(self.doing, self.n_rows, None, "tokens")
            yield batch

    def description(self) -> dict[str, Any]:
        chats = {"roles": self.roles.names, "chat_template": self.template_digest}
        return {key: value for key, value in chats.items() if value} | {
            "documents_digest": self.digest.hexdigest(),
            "replaced_surrogates": self.n_replaced,
            "empty_documents": self.n_empty,
            "max_tokens": self.max_tokens,
        }


def _chats(request: Request, tokenizer: TokenizerHandle) -> Chats | None:
    return None if request.chat_field is None else tokenizer.chats(request.chat_field)


def _documents(request: Request, dataset: Any, chats: Chats | None) -> Iterator[Document]:
    return read_documents(
        dataset,
        text_field=request.text_field,
        chats=chats,
        config=request.dataset_config,
        split=request.dataset_split,
    )


def store_segment(
    writer: StoreWriter, request: Request, dataset: Any, tokenizer: TokenizerHandle, report: Report
) -> Segment:
    """Read, tokenise and store a dataset as the next segment; call with the store's lock held.

    Raises RecipeMismatch where the store has chats of another template.
    """
    chats, layout = _chats(request, tokenizer), writer.layout
    described = [manifest["describe"] for manifest in StoreReader(writer.root).corpus_manifests]
    roles = Roles(described[-1].get("roles", ()) if described else ())
    if chats is not None:
        _refuse_other_template(chats, described)
    watch = _Watch(report, "tokenising", request.max_tokens, roles, None if chats is None else chats.template.digest)
    batches = lay_out(
        _documents(request, dataset, chats),
        tokenizer,
        Window(writer.store.context, writer.store.stride),
        shard_rows=writer.store.shard_rows,
        first_doc=layout.n_docs,
        first_seq=layout.n_seqs,
        first_shard=layout.n_shards,
        max_tokens=request.max_tokens,
        roles=roles,
    )
    return writer.write_segment(watch.batches(batches), watch.description)


def _refuse_other_template(chats: Chats, described: Sequence[Mapping[str, Any]]) -> None:
    for segment, description in enumerate(described):
        stored = description.get("chat_template", chats.template.digest)
        if stored != chats.template.digest:
            raise RecipeMismatch(
                explain(
                    f"The chats of segment {segment} were written by the chat template {stored[:16]}…, "
                    f"these would be by {chats.template.digest[:16]}…",
                    accepted="chats of one template in a store",
                    next_step="give the tokenizer that made the store, or another --out",
                )
            )


def count_rows(
    request: Request, tokenizer: TokenizerHandle, window: Window, shard_rows: int, report: Report
) -> tuple[int, int, int]:
    """Return how many documents, rows and shards the dataset, or what is to be appended, makes; stores nothing."""
    dataset = request.dataset if request.append is None else request.append
    watch = _Watch(report, "counting tokens", request.max_tokens)
    documents = _documents(request, dataset, _chats(request, tokenizer))
    batches = lay_out(documents, tokenizer, window, shard_rows=shard_rows, max_tokens=request.max_tokens)
    for _ in watch.batches(batches):
        pass
    return watch.n_documents, watch.n_rows, watch.n_shards


def digest_of_dataset(
    request: Request, dataset: Any, tokenizer: TokenizerHandle, n_documents: int, *, cut: bool
) -> str:
    """Return the digest of a dataset's documents, to compare with a stored segment of `n_documents`.

    Where the segment was `cut` by `--max-tokens`, only as many documents are read as were stored.
    """
    digest = DocumentsDigest()
    limit = n_documents if cut else None
    for document in itertools.islice(_documents(request, dataset, _chats(request, tokenizer)), limit):
        digest.update(document)
    return digest.hexdigest()
