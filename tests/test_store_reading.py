"""What was written is what is read: documents, rows, firings; and what is damaged is never read as something else."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_support import copy_of_finished, extract_some, finished, same_bits
from tiny_world import RESIDUAL_SAE, SHARD_ROWS, tiny_world

from actstore.blocks import TOKEN_FIELDS
from actstore.errors import CorruptStore, UnknownName
from actstore.store import StoreReader

SITE = "sites/resid_post.1"
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def reader() -> StoreReader:
    return StoreReader(finished())


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A store to damage."""
    return copy_of_finished(tmp_path)


def raw(path: str) -> npt.NDArray[Any]:
    """Return an array whole, as plain zarr reads it, filler included."""
    array = zarr.open_group(finished() / "arrays", mode="r")[path]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[...])


def given_documents() -> list[dict[str, Any]]:
    return [json.loads(line) for line in tiny_world().dataset.read_text().splitlines()]


def rows_in_use() -> npt.NDArray[np.int64]:
    return np.flatnonzero(raw("corpus/tokens")[:, 0] >= 0).astype(np.int64)


def stored_documents(reader: StoreReader) -> list[dict[str, Any]]:
    return [row for batch in reader.documents(0) for row in batch.to_pylist()]


# Documents and sequences


def test_documents_come_back_character_by_character(reader: StoreReader) -> None:
    found = stored_documents(reader)

    assert [row["text"] for row in found] == [document["text"] for document in given_documents()]
    assert [json.loads(row["metadata"])["number"] for row in found] == [one["number"] for one in given_documents()]
    assert any("\0" in row["text"] for row in found), "the world has a NUL"
    assert any(unicodedata.category(char) == "So" for row in found for char in row["text"]), "and an emoji"


def test_one_document_at_a_time_is_the_same(reader: StoreReader) -> None:
    texts = [document["text"] for document in given_documents()]

    assert [reader.document_text(doc) for doc in range(len(texts))] == texts
    with pytest.raises(UnknownName, match=f"document {len(texts)}"):
        reader.document_text(len(texts))


def test_sequences_tile_the_rows_in_use(reader: StoreReader) -> None:
    sequences = reader.sequences(0)
    rows = np.concatenate([np.arange(row, row + n_tokens) for _, row, n_tokens in sequences])

    assert np.array_equal(rows, rows_in_use())
    assert (sequences[:, 1] // SHARD_ROWS == (sequences[:, 1] + sequences[:, 2] - 1) // SHARD_ROWS).all()
    assert np.array_equal(reader.documents_of(np.arange(len(sequences))), sequences[:, 0])


def test_tokens_point_into_their_documents_text(reader: StoreReader) -> None:
    texts = [document["text"] for document in given_documents()]
    fields = {name: reader.token_column(name, rows_in_use()) for name in TOKEN_FIELDS}
    docs = reader.documents_of(fields["seq"])
    spelled = reader.vocabulary().to_pylist()

    for doc, start, end, token_id in zip(
        docs, fields["char_start"], fields["char_end"], fields["token_id"], strict=True
    ):
        piece = texts[doc][start:end]
        assert spelled[token_id].replace("▁", " ").strip() in (piece.strip(), "") or end - start <= 1


# Rows


@PROPERTY
@given(places=st.lists(st.integers(0, 10**6), max_size=40), path=st.sampled_from([SITE, "predictions/ids"]))
def test_gather_agrees_with_picking_rows_one_by_one(reader: StoreReader, places: list[int], path: str) -> None:
    in_use = rows_in_use()
    rows = in_use[np.array(places, dtype=np.int64) % len(in_use)]
    whole = raw(path)

    found = reader.gather(path, rows)

    expected = np.stack([whole[row] for row in rows]) if len(rows) else whole[:0]
    assert same_bits(found, expected)


def test_a_shard_is_read_without_its_filler(reader: StoreReader) -> None:
    whole, tokens = raw(SITE), raw("corpus/tokens")
    for shard, n_rows in enumerate(reader.rows_used):
        first = shard * SHARD_ROWS
        assert same_bits(reader.matrix(SITE, shard), whole[first : first + n_rows])
        assert (tokens[first + n_rows : first + SHARD_ROWS] == -1).all()
        assert np.isnan(whole[first + n_rows : first + SHARD_ROWS]).all()


def test_filler_rows_have_no_firings(reader: StoreReader) -> None:
    for shard, n_rows in enumerate(reader.rows_used):
        firings = reader.firings(RESIDUAL_SAE, shard)
        assert firings.n_rows == SHARD_ROWS
        assert len(firings.features) > 0
        assert (np.diff(firings.indptr)[n_rows:] == 0).all()


@pytest.mark.parametrize("kind", ["negative", "filler", "beyond"])
def test_rows_that_are_none_are_refused(reader: StoreReader, kind: str) -> None:
    row = {"negative": -1, "filler": int(reader.rows_used[0]), "beyond": 10**9}[kind]
    for read in (lambda rows: reader.gather(SITE, rows), lambda rows: reader.token_column("pos", rows)):
        with pytest.raises(UnknownName, match=f"row {row}"):
            read(np.array([0, row]))


@pytest.mark.parametrize("path", ["sites/resid_post.2", "firings/other"])
def test_what_is_not_stored_is_refused_with_what_is(reader: StoreReader, path: str) -> None:
    with pytest.raises(UnknownName, match=r"sites/resid_post\.1"):
        reader.matrix(path, 0)


def test_a_shard_without_receipt_does_not_exist(tmp_path: Path) -> None:
    extract_some(tmp_path / "s", 3)
    receipts = sorted((tmp_path / "s").glob("passes/*/receipts/*.json"))
    receipts[1].unlink()

    reader = StoreReader(tmp_path / "s")

    assert list(reader.done(SITE)) == list(reader.done(f"firings/{RESIDUAL_SAE}")) == [0, 2]
    assert (tmp_path / "s/arrays" / SITE / "c.1.0").exists()
    for read in (
        lambda: reader.matrix(SITE, 1),
        lambda: reader.gather(SITE, np.array([0, SHARD_ROWS])),
        lambda: reader.firings(RESIDUAL_SAE, 1),
    ):
        with pytest.raises(UnknownName, match=r"Shard 1 .* is not stored"):
            read()
    assert reader.matrix(SITE, 2).shape[0] == reader.rows_used[2]


# Damage

ROWS_0 = np.arange(5)
READS: dict[str, tuple[str, Callable[[StoreReader], Any]]] = {
    "a site": (f"arrays/{SITE}/c.0.0", lambda reader: reader.matrix(SITE, 0)),
    "gathered rows": (f"arrays/{SITE}/c.0.0", lambda reader: reader.gather(SITE, ROWS_0)),
    "predictions": ("arrays/predictions/values/c.1.0", lambda reader: reader.matrix("predictions/values", 1)),
    "tokens": ("arrays/corpus/tokens/c.1.0", lambda reader: reader.tokens(1)),
    "firings": (f"firings/{RESIDUAL_SAE}/2.zip", lambda reader: reader.firings(RESIDUAL_SAE, 2)),
    "feature logits": (
        f"firings/{RESIDUAL_SAE}/feature_logits.zip",
        lambda reader: reader.feature_logits(RESIDUAL_SAE),
    ),
    "sequences": ("arrays/corpus/segments/0/sequences/c.0.0", lambda reader: reader.sequences(0)),
    "documents": ("arrays/corpus/segments/0/documents/c.0.0", lambda reader: list(reader.documents(0))),
    "text": ("arrays/corpus/segments/0/text/c.0", lambda reader: list(reader.documents(0))),
    "one text": ("arrays/corpus/segments/0/text/c.0", lambda reader: reader.document_text(0)),
    "metadata": ("arrays/corpus/segments/0/metadata/c.0", lambda reader: list(reader.documents(0))),
}
CASES = pytest.mark.parametrize(("name", "read"), READS.values(), ids=READS)


@CASES
def test_a_missing_file_is_named_and_never_fill_values(
    damaged: Path, name: str, read: Callable[[StoreReader], Any]
) -> None:
    (damaged / name).unlink()

    with pytest.raises(CorruptStore, match=name):
        read(StoreReader(damaged))


@CASES
def test_a_cut_file_is_refused(damaged: Path, name: str, read: Callable[[StoreReader], Any]) -> None:
    data = (damaged / name).read_bytes()
    for size in (len(data) - 1, len(data) // 2, 0):
        (damaged / name).write_bytes(data[:size])
        with pytest.raises(CorruptStore, match=name):
            read(StoreReader(damaged))


@CASES
def test_a_changed_bit_is_refused_or_lies_where_nothing_is_read(
    damaged: Path, name: str, read: Callable[[StoreReader], Any]
) -> None:
    expected = repr_of(read(StoreReader(damaged)))
    data = (damaged / name).read_bytes()
    n_refused = 0
    for offset in np.random.default_rng(6).integers(0, len(data), 12):
        changed = bytearray(data)
        changed[offset] ^= 0x04
        (damaged / name).write_bytes(changed)
        try:
            assert repr_of(read(StoreReader(damaged))) == expected
        except CorruptStore:
            n_refused += 1
    assert n_refused > 0


def repr_of(read: Any) -> str:
    """Spell out what any of the reads returns."""
    with np.printoptions(threshold=10**9):
        if isinstance(read, list):
            return repr([batch.to_pylist() for batch in read])
        return repr(read)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"firings/{RESIDUAL_SAE}/0.zip", f"firings/{RESIDUAL_SAE}/1.zip"),
        (f"arrays/{SITE}/c.0.0", f"arrays/{SITE}/c.1.0"),
    ],
    ids=["firings", "site"],
)
def test_two_shards_exchanged_are_not_read_as_each_other(damaged: Path, one: str, other: str) -> None:
    first, second = (damaged / one).read_bytes(), (damaged / other).read_bytes()
    (damaged / one).write_bytes(second)
    (damaged / other).write_bytes(first)
    reader = StoreReader(damaged)

    for shard in (0, 1):
        with pytest.raises(CorruptStore, match=f"{one}|{other}"):
            _ = reader.firings(RESIDUAL_SAE, shard) if "firings" in one else reader.matrix(SITE, shard)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("passes/corpus/sealed-0.json", lambda reader: reader.rows_used),
        ("passes/*/pass.json", lambda reader: reader.tables()),
        (f"arrays/{SITE}/zarr.json", lambda reader: reader.matrix(SITE, 0)),
        ("kit/*.zip", lambda reader: (reader.vocabulary(), reader.kit_piece(reader.kit_digest("unembedding", SITE)))),
    ],
    ids=["corpus manifest", "pass", "array metadata", "kit"],
)
def test_what_else_is_missing_is_named(damaged: Path, name: str, read: Callable[[StoreReader], Any]) -> None:
    gone = sorted(damaged.glob(name))
    for path in gone:
        path.unlink()

    with pytest.raises(CorruptStore) as raised:
        read(StoreReader(damaged))

    assert any(path.relative_to(damaged).as_posix() in str(raised.value) for path in gone)


def test_an_array_that_claims_to_be_shorter_is_refused(damaged: Path) -> None:
    path = damaged / f"arrays/{SITE}/zarr.json"
    body = json.loads(path.read_bytes())
    path.write_text(json.dumps({**body, "shape": [10, body["shape"][1]]}))

    with pytest.raises(CorruptStore, match="ends at 10"):
        StoreReader(damaged).matrix(SITE, 0)
