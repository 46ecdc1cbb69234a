"""Documents become rows: windows, packing, flags and offsets against a layout written token by token."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from corpus_support import byte_level, expected_layout, metaspace, row_values, token_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.blocks import FLAG_REPEAT, FLAG_SPECIAL
from actstore.corpus import CorpusBatch, Document, DocumentsDigest, TokenizerHandle, Window, lay_out
from actstore.errors import InvalidInput

TOKENIZERS = [pytest.param(metaspace, id="metaspace_with_bos"), pytest.param(byte_level, id="byte_level_without_bos")]
BIDI, ZERO_WIDTH, FAMILY = "\u202e\u05d0", "\u200b\u200d", "👩\u200d👩\u200d👧"
CHUNKS = ["the", " the", " ", "cat", "on", "zq", "\n", "\0", "é", " é", "日本", "😀", BIDI, ZERO_WIDTH, FAMILY, "▁"]
TEXTS = st.lists(st.sampled_from([*CHUNKS, "<bos>", "<eos>"]), max_size=12).map("".join)


def lay_out_texts(texts: list[str], tokenizer: TokenizerHandle, window: Window, **options: Any) -> list[CorpusBatch]:
    return list(lay_out([Document(text) for text in texts], tokenizer, window, **options))


def rows_by_number(batches: list[CorpusBatch], shard_rows: int) -> dict[int, list[int]]:
    """Return every row that is not filler, by its number in the store."""
    return {
        shard.shard * shard_rows + i: row
        for batch in batches
        for shard in batch.shards
        for i, row in enumerate(shard.values.tolist())
        if row[0] >= 0
    }


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[str], Window, dict[str, Any]]:
    texts = draw(st.lists(TEXTS, min_size=1, max_size=6).filter(any))
    context = draw(st.integers(2, 9))
    stride = draw(st.none() | st.integers(1, context - 1))
    options: dict[str, Any] = {"shard_rows": draw(st.integers(context, context + 12))}
    options |= {name: draw(st.integers(0, 3)) for name in ("first_doc", "first_seq", "first_shard")}
    return texts, Window(context, stride), options


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(layouts(), st.integers(1, 4), st.none() | st.integers(1, 60))
def test_a_layout_equals_the_one_written_token_by_token(
    make: Callable[[], TokenizerHandle],
    layout: tuple[list[str], Window, dict[str, Any]],
    batch_documents: int,
    max_tokens: int | None,
) -> None:
    texts, window, options = layout
    expected = expected_layout(texts, make(), window, **options, max_tokens=max_tokens)
    batches = lay_out_texts(texts, make(), window, **options, max_tokens=max_tokens, batch_documents=batch_documents)
    assert [row.n_tokens for batch in batches for row in batch.documents] == expected.n_tokens
    assert [tuple(row) for batch in batches for row in batch.sequences.tolist()] == expected.sequences
    found = rows_by_number(batches, options["shard_rows"])
    assert found == {row: row_values(values) for row, values in expected.rows.items()}
    shards = [shard.shard for batch in batches for shard in batch.shards]
    assert shards == list(range(options["first_shard"], options["first_shard"] + len(shards)))


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(layouts())
def test_a_shard_holds_whole_sequences_first_and_filler_of_minus_one_last(
    make: Callable[[], TokenizerHandle], layout: tuple[list[str], Window, dict[str, Any]]
) -> None:
    texts, window, options = layout
    batches = lay_out_texts(texts, make(), window, **options)
    sequences = np.concatenate([batch.sequences for batch in batches])
    shard_rows = options["shard_rows"]
    assert np.all(sequences[:, 1] // shard_rows == (sequences[:, 1] + sequences[:, 2] - 1) // shard_rows)
    for shard in (shard for batch in batches for shard in batch.shards):
        assert shard.values.shape == (shard_rows, 7)
        assert shard.values.dtype == np.int32
        assert np.all(shard.values[shard.n_rows :] == -1)
        assert np.all(shard.values[: shard.n_rows, 0] >= 0)


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(layouts())
def test_tokens_that_are_not_repeats_spell_the_documents_own_tokens(
    make: Callable[[], TokenizerHandle], layout: tuple[list[str], Window, dict[str, Any]]
) -> None:
    texts, window, options = layout
    tokenizer = make()
    batches = lay_out_texts(texts, tokenizer, window, **options)
    rows = np.array([row for _, row in sorted(rows_by_number(batches, options["shard_rows"]).items())])
    is_bos = (rows[:, 2] == 0) if tokenizer.bos_id is not None else np.zeros(len(rows), dtype=bool)
    kept = rows[~is_bos & (rows[:, 5] & FLAG_REPEAT == 0)]
    whole = [i for text in texts for i in tokenizer.backend.encode(text, add_special_tokens=False).ids]
    assert kept[:, 0].tolist() == whole


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(TEXTS.filter(bool))
def test_offsets_lead_to_the_characters_that_a_token_spells(make: Callable[[], TokenizerHandle], text: str) -> None:
    tokenizer = make()
    vocabulary = tokenizer.vocabulary()
    batches = lay_out_texts([text], tokenizer, Window(5, 2), shard_rows=7)
    for _, row in sorted(rows_by_number(batches, 7).items()):
        token_id, pos, start, end = row[0], row[2], row[3], row[4]
        if tokenizer.bos_id is not None and pos == 0:
            assert start == end
        else:
            assert 0 <= start < end <= len(text)
            marked = text[start:end].replace("▁", " ") if tokenizer.bos_id is not None else text[start:end]
            assert token_bytes(vocabulary[token_id]) in marked.encode()


def test_every_byte_token_of_one_character_has_that_characters_offsets() -> None:
    [batch] = lay_out_texts(["a😀b"], metaspace(), Window(8), shard_rows=7 + 1)[1:]
    [shard] = batch.shards
    assert shard.column("char_start").tolist() == [0, 0, 1, 1, 1, 1, 2, -1]
    assert shard.column("char_end").tolist() == [0, 1, 2, 2, 2, 2, 3, -1]


def test_special_tokens_are_flagged_by_id_wherever_they_stand() -> None:
    *_, last = lay_out_texts(["<bos><eos>", "the<eos>"], metaspace(), Window(4), shard_rows=8)
    [shard] = last.shards
    assert shard.column("token_id").tolist()[:3] == [2, 2, 1]
    assert (shard.column("flags") & FLAG_SPECIAL).tolist() == [1, 1, 1, 1, 0, 1, 1, 1]  # -1 at the tail has every bit


def test_overlapping_windows_flag_what_an_earlier_one_had() -> None:
    *_, last = lay_out_texts(["ababa"], metaspace(), Window(4, 1), shard_rows=12)
    assert last.shards[0].column("flags").tolist() == [1, 0, 0, 0, 1, 4, 4, 0, 1, 4, 4, 0]


def test_a_window_without_bos_holds_context_text_tokens_and_does_not_overlap() -> None:
    batches = lay_out_texts(["ababab"], byte_level(), Window(3), shard_rows=6)
    assert batches[0].sequences.tolist() == [[0, 0, 3], [0, 3, 3]]
    assert batches[0].shards[0].column("flags").tolist() == [0] * 6


@pytest.mark.parametrize("has_bos", [True, False], ids=["with_bos", "without_bos"])
def test_a_window_made_with_the_resolved_stride_cuts_the_same(has_bos: bool) -> None:
    resolved = Window(4, Window(4).text_stride(has_bos=has_bos))
    found, expected = (window.cut(np.arange(20), has_bos=has_bos) for window in (resolved, Window(4)))
    assert found.start.tolist() == expected.start.tolist()
    assert found.n_repeat.tolist() == expected.n_repeat.tolist() == [0] * len(expected.start)


def test_a_full_last_shard_is_yielded_once_and_nothing_follows() -> None:
    batches = lay_out_texts(["abc"], metaspace(), Window(4), shard_rows=4)
    assert [len(batch.shards) for batch in batches] == [1]


def test_an_empty_document_is_kept_without_sequences() -> None:
    batches = lay_out_texts(["", "a", ""], metaspace(), Window(4), shard_rows=4)
    assert [row.n_tokens for row in batches[0].documents] == [0, 1, 0]
    assert batches[0].sequences.tolist() == [[1, 0, 2]]


def test_max_tokens_stops_after_the_whole_document_that_reaches_it() -> None:
    texts = ["abc", "ababababa", "a"]
    batches = lay_out_texts(texts, metaspace(), Window(4), shard_rows=8, max_tokens=5)
    assert [row.n_tokens for row in batches[0].documents] == [3, 9]
    assert sum(int(batch.sequences[:, 2].sum()) for batch in batches) == 16


def test_a_document_that_reaches_max_tokens_exactly_is_the_last_one() -> None:
    batches = lay_out_texts(["abc", "a", "a"], metaspace(), Window(4), shard_rows=8, max_tokens=4)
    assert [row.text for row in batches[0].documents] == ["abc"]


def test_long_documents_are_not_collected_into_one_batch() -> None:
    texts = ["a " * 200_000] * 4
    assert max(len(batch.documents) for batch in lay_out_texts(texts, metaspace(), Window(64), shard_rows=4096)) == 3


def test_a_document_carries_its_metadata_as_canonical_json() -> None:
    document = Document("a", {"b": [1, None], "a": "é"}, n_replaced=2)
    [row] = next(lay_out([document], metaspace(), Window(2), shard_rows=2)).documents
    assert (row.metadata, row.n_replaced) == ('{"a":"é","b":[1,null]}', 2)


def test_the_digest_of_documents_is_the_same_before_and_after_the_layout() -> None:
    documents = [Document("a", {"b": 1, "a": "é"}), Document("the cat"), Document("")]
    before, after, other = DocumentsDigest(), DocumentsDigest(), DocumentsDigest()
    for document in documents:
        before.update(document)
        other.update(Document(document.text))
    for batch in lay_out(documents, metaspace(), Window(4), shard_rows=8):
        for row in batch.documents:
            after.update(row)
    assert before.hexdigest() == after.hexdigest() != other.hexdigest()


def test_a_document_of_a_megabyte_is_laid_out_whole() -> None:
    text = "the cat on the " * 70_000
    batches = lay_out_texts([text], metaspace(), Window(1024), shard_rows=16_384)
    assert sum(shard.n_rows for batch in batches for shard in batch.shards) == batches[0].sequences[:, 2].sum()
    last_row = batches[0].sequences[-1, 1:].sum() - 1
    final = [shard for batch in batches for shard in batch.shards][-1]
    assert final.values[last_row % 16_384, 4] == len(text)


def test_memory_does_not_grow_with_the_number_of_documents() -> None:
    def peak(n_documents: int) -> int:
        documents: Iterator[Document] = (Document("the cat on the " * 20) for _ in range(n_documents))
        gc.collect()
        tracemalloc.start()
        for _ in lay_out(documents, metaspace(), Window(64), shard_rows=512, batch_documents=16):
            pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak_bytes

    peak(32)
    assert peak(640) < 1.5 * peak(64)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        pytest.param(lambda: Window(1), ["context is 1", "at least 2", "1024"], id="context_too_short"),
        pytest.param(lambda: Window(4, 5), ["stride is 5", "from 1 to 4", "leave it out"], id="stride_too_long"),
        pytest.param(lambda: Window(4, 0), ["stride is 0", "from 1 to 4"], id="stride_zero"),
        pytest.param(
            lambda: lay_out([], metaspace(), Window(4, 4), shard_rows=8),
            ["stride is 4", "from 1 to 3", "leave it out"],
            id="stride_leaves_gaps_beside_bos",
        ),
        pytest.param(
            lambda: lay_out([], metaspace(), Window(9), shard_rows=8),
            ["window of 9 tokens", "shard of 8 rows", "at most 8", "shard_rows"],
            id="window_longer_than_a_shard",
        ),
        pytest.param(
            lambda: lay_out([], metaspace(), Window(8), shard_rows=8, max_tokens=0),
            ["max_tokens is 0", "at least 1"],
            id="max_tokens_zero",
        ),
        pytest.param(
            lambda: lay_out_texts(["", ""], metaspace(), Window(8), shard_rows=8),
            ["No document has a token", "text_field"],
            id="nothing_to_run",
        ),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_the_next_step(make: Callable[[], object], parts: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), str(caught.value)
