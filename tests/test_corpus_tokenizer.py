"""Tokenizers: the facts that identify them and the display text of their tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from corpus_support import byte_level, byte_level_transformers, metaspace, metaspace_transformers, token_bytes
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actstore.corpus import TokenizerHandle, load_tokenizer
from actstore.corpus.vocabulary import display_vocabulary
from actstore.errors import ActstoreError, InvalidInput, MissingInput


def test_a_metaspace_tokenizer_shows_spaces_and_readable_bytes() -> None:
    vocabulary = metaspace().vocabulary()
    ids = metaspace().backend.get_vocab()
    shown = {token: vocabulary[i] for token, i in ids.items()}
    assert vocabulary[:4] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert (shown["▁"], shown["▁the"], shown["cat"]) == (" ", " the", "cat")
    assert (shown["<0x0A>"], shown["<0x41>"], shown["<0x00>"], shown["<0xE2>"]) == ("\n", "A", "<0x00>", "<0xE2>")


def test_a_byte_level_tokenizer_shows_text_and_the_bytes_that_are_none() -> None:
    vocabulary = byte_level().vocabulary()
    ids = byte_level().backend.get_vocab()
    shown = {token: vocabulary[i] for token, i in ids.items()}
    assert (shown["Ġthe"], shown["Ã©"], shown["Ċ"], shown["<eos>"]) == (" the", "é", "\n", "<eos>")
    assert (shown["â"], shown["ĠÃ"], shown["Ā"]) == ("<0xE2>", " <0xC3>", "<0x00>")


def test_an_added_token_of_a_byte_level_tokenizer_is_text_already() -> None:
    ids = byte_level().backend.get_vocab(with_added_tokens=True)
    assert byte_level().vocabulary()[ids["é|"]] == "é|"


def test_ids_without_a_token_are_empty_up_to_the_largest_id() -> None:
    vocabulary = byte_level().vocabulary()
    assert len(vocabulary) == byte_level().vocabulary_size
    assert vocabulary[257:265] == [""] * 8
    assert vocabulary[-1] != ""


@given(st.text(max_size=20).map(lambda text: text.replace("<", "").replace("|", "")))
def test_byte_level_display_texts_spell_the_text(text: str) -> None:
    vocabulary = byte_level().vocabulary()
    assert b"".join(token_bytes(vocabulary[i]) for i in byte_level().encode([text]).ids) == text.encode()


def test_the_mark_of_a_metaspace_pre_tokenizer_without_decoder_is_a_space() -> None:
    backend = Tokenizer(models.WordLevel({"_a": 0, "<0x41>": 1}, unk_token="_a"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="_")
    assert display_vocabulary(json.loads(backend.to_str()), backend.get_vocab(), frozenset()) == [" a", "<0x41>"]


def test_special_ids_are_those_of_the_tokenizer_and_its_special_added_tokens() -> None:
    assert metaspace().special_ids == {0, 1, 2, 3}
    assert (metaspace().bos_id, metaspace().pad_id) == (2, 0)
    assert byte_level().special_ids == {0}
    assert (byte_level().bos_id, byte_level().pad_id) == (None, None)


def test_a_special_token_without_a_role_and_a_role_without_a_special_token_are_both_special() -> None:
    backend = Tokenizer.from_str(metaspace_transformers().backend_tokenizer.to_str())
    backend.add_special_tokens(["<turn>"])
    loaded = PreTrainedTokenizerFast(tokenizer_object=backend)
    loaded.bos_token = "the"
    the, turn = backend.token_to_id("the"), backend.token_to_id("<turn>")
    assert {the, turn} <= TokenizerHandle.from_transformers(loaded).special_ids


def test_encoding_adds_nothing_and_gives_code_point_offsets() -> None:
    encoded = metaspace().encode(["a😀", "", "the"])
    assert encoded.n_tokens.tolist() == [5, 0, 1]
    assert encoded.char_start.tolist() == [0, 1, 1, 1, 1, 0]
    assert encoded.char_end.tolist() == [1, 2, 2, 2, 2, 3]


def test_truncation_and_padding_of_earlier_calls_change_neither_tokens_nor_digest() -> None:
    tokenizer = Tokenizer.from_str(metaspace_transformers().backend_tokenizer.to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    loaded = type(metaspace_transformers())(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    before = loaded.backend_tokenizer.to_str()
    handle = TokenizerHandle.from_transformers(loaded)
    assert handle.encode(["the cat on"]).n_tokens.tolist() == metaspace().encode(["the cat on"]).n_tokens.tolist()
    assert handle == metaspace()
    assert loaded.backend_tokenizer.to_str() == before


def test_the_digest_depends_on_the_bos_id() -> None:
    loaded = type(metaspace_transformers())(
        tokenizer_object=metaspace_transformers().backend_tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    assert TokenizerHandle.from_transformers(loaded).digest != metaspace().digest


@pytest.mark.parametrize("make", [metaspace_transformers, byte_level_transformers], ids=["metaspace", "byte_level"])
def test_a_saved_tokenizer_loads_as_the_same(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded == TokenizerHandle.from_transformers(make())
    assert loaded.vocabulary() == TokenizerHandle.from_transformers(make()).vocabulary()


class SlowTokenizer:
    is_fast = False


@pytest.mark.parametrize(
    ("source", "error", "parts"),
    [
        pytest.param("/no/such/folder", MissingInput, ["/no/such/folder", "owner/name"], id="missing"),
        pytest.param("empty", InvalidInput, ["tokenizer.json", "save_pretrained"], id="empty_folder"),
        pytest.param("broken", InvalidInput, ["no fast tokenizer", "tokenizer.json"], id="broken_json"),
        pytest.param("file.txt", MissingInput, ["file.txt", "model folder"], id="file_in_place_of_folder"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_an_error_with_the_next_step(
    source: str, error: type[ActstoreError], parts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "broken" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "file.txt").write_text("a")
    with pytest.raises(error) as caught:
        load_tokenizer(tmp_path / source)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"SlowTokenizer is not a fast tokenizer.*AutoTokenizer"):
        TokenizerHandle.from_transformers(SlowTokenizer())
