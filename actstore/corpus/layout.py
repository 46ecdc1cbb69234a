"""Layout: documents to rows. Tokenised once, before any model starts, so that every row is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actstore.blocks import TokenShard
from actstore.errors import InvalidInput, explain
from actstore.sealed import canonical_json

from .document import Document, MessageSpan
from .message_tokens import Roles, mark_messages
from .packing import ShardPacker
from .rows import sequence_rows, token_rows
from .tokenizer import EncodedTexts, TokenizerHandle
from .window import Window

__all__ = ["CorpusBatch", "DocumentRow", "lay_out"]

# Documents are tokenised together until they have so many characters: bounds memory, keeps all cores busy.
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class DocumentRow:
    """One document as it is stored: docs/format.md §3, `documents`."""

    text: str
    metadata: str  # canonical JSON of one object
    n_tokens: int  # text tokens; 0 for a document without sequences
    n_replaced: int
    messages: tuple[MessageSpan, ...] = ()


@dataclass(frozen=True)
class CorpusBatch:
    """What some documents became, in order; `shards` are those finished with this batch.

    sequences int64 (sequence, 3): doc, row, n_tokens (BOS included).
    """

    documents: tuple[DocumentRow, ...]
    sequences: npt.NDArray[np.int64]
    shards: tuple[TokenShard, ...]


def lay_out(
    documents: Iterable[Document],
    tokenizer: TokenizerHandle,
    window: Window,
    *,
    shard_rows: int,
    first_doc: int = 0,
    first_seq: int = 0,
    first_shard: int = 0,
    max_tokens: int | None = None,
    roles: Roles | None = None,
    batch_documents: int = 256,
) -> Iterator[CorpusBatch]:
    """Tokenise documents, cut them into windows that each begin with BOS, and pack these into shards.

    Yields batches as they are ready; the last one holds the last shard, padded with filler. `max_tokens` counts
    rows, BOS included: the document that reaches it is the last one, and whole. Memory depends on `shard_rows` and
    the longest document, not on their number; rows do not depend on `batch_documents`. `roles` gets the roles of chats.
    Raises InvalidInput where a window is longer than a shard or windows leave gaps, and where no document has a token.
    """
    # Asked here so that a stride that leaves gaps is refused before the first document is read.
    window.text_stride(has_bos=tokenizer.bos_id is not None)
    _check(window, shard_rows, max_tokens, batch_documents)
    layout = _Layout(tokenizer, window, ShardPacker(shard_rows, first_shard), roles or Roles(), first_doc, first_seq)
    return layout.run(_batches(documents, batch_documents), max_tokens)


@dataclass
class _Layout:
    """Where the layout stands: the next document's and sequence's number, and the rows so far."""

    tokenizer: TokenizerHandle
    window: Window
    packer: ShardPacker
    roles: Roles
    doc: int
    seq: int
    n_rows: int = 0

    @property
    def has_bos(self) -> bool:
        return self.tokenizer.bos_id is not None

    def run(self, batches: Iterator[list[Document]], max_tokens: int | None) -> Iterator[CorpusBatch]:
        for documents in batches:
            texts = self.tokenizer.encode([document.text for document in documents])
            encoded = mark_messages(texts, documents, self.tokenizer, self.roles)
            if max_tokens is not None:
                encoded = encoded.first(self._n_allowed(encoded, max_tokens - self.n_rows))
            yield self._batch(documents[: len(encoded.n_tokens)], encoded)
            if max_tokens is not None and self.n_rows >= max_tokens:
                break
        if self.n_rows == 0:
            raise _nothing_to_run()
        if rest := self.packer.close():
            yield CorpusBatch((), np.empty((0, 3), dtype=np.int64), rest)

    def _n_allowed(self, encoded: EncodedTexts, rows_left: int) -> int:
        """Return how many documents there are up to and with the one that uses up `rows_left`."""
        cuts = self.window.cut(encoded.n_tokens, has_bos=self.has_bos)
        rows = np.zeros(len(encoded.n_tokens), dtype=np.int64)
        np.add.at(rows, cuts.document, cuts.n_text + encoded.n_bos[cuts.document])
        return int(np.searchsorted(np.cumsum(rows), rows_left, side="left")) + 1

    def _batch(self, documents: Sequence[Document], encoded: EncodedTexts) -> CorpusBatch:
        cuts = self.window.cut(encoded.n_tokens, has_bos=self.has_bos)
        n_tokens = cuts.n_text + encoded.n_bos[cuts.document]
        first_rows = self.packer.place(n_tokens)
        values = token_rows(encoded, cuts, self.tokenizer, self.seq)
        shards = self.packer.add(sequence_rows(first_rows, n_tokens), values)
        sequences = np.stack([cuts.document + self.doc, first_rows, n_tokens], axis=1)
        self.doc += len(documents)
        self.seq += len(sequences)
        self.n_rows += len(values)
        rows = map(_document_row, documents, encoded.n_tokens.tolist())
        return CorpusBatch(tuple(rows), sequences, shards)


def _document_row(document: Document, n_tokens: int) -> DocumentRow:
    metadata = canonical_json(dict(document.metadata)).decode()
    return DocumentRow(document.text, metadata, n_tokens, document.n_replaced, document.messages)


def _batches(documents: Iterable[Document], batch_documents: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    n_characters = 0
    for document in documents:
        batch.append(document)
        n_characters += len(document.text)
        if len(batch) == batch_documents or n_characters >= BATCH_CHARACTERS:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _check(window: Window, shard_rows: int, max_tokens: int | None, batch_documents: int) -> None:
    if window.context > shard_rows:
        raise InvalidInput(
            explain(
                f"A window of {window.context} tokens does not fit into a shard of {shard_rows} rows",
                accepted=f"a context of at most {shard_rows}",
                next_step="give a shorter context or larger shards (shard_rows)",
            )
        )
    for name, value in (("max_tokens", max_tokens), ("batch_documents", batch_documents)):
        if value is not None and value < 1:
            raise InvalidInput(
                explain(
                    f"{name} is {value}", accepted="an integer of at least 1", next_step="give more, or leave it out"
                )
            )


def _nothing_to_run() -> InvalidInput:
    return InvalidInput(
        explain(
            "No document has a token, so there is nothing to run",
            accepted="at least one document with text",
            next_step="check the dataset and the field that holds its text (text_field)",
        )
    )
