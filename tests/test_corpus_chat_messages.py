"""What a chat may look like: the forms of messages that are read, and those that are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from chat_support import FAMILIES, gemma_pieces, handle, rendered, talk, with_template
from corpus_support import metaspace_transformers

from actstore.corpus import TokenizerHandle, read_documents
from actstore.errors import InvalidInput

SHAREGPT = [{"from": "human", "value": "the"}, {"from": "gpt", "value": "cat"}]


@pytest.mark.parametrize(
    "item",
    [
        pytest.param({"talk": talk("the", "cat"), "id": 7}, id="field"),
        pytest.param(talk("the", "cat"), id="list"),
        pytest.param(tuple(talk("the", "cat")), id="tuple"),
        pytest.param({"talk": SHAREGPT}, id="sharegpt"),
        pytest.param({"talk": [one | {"weight": None} for one in talk("the", "cat")]}, id="null_fields"),
        pytest.param({"talk": np.array(talk("the", "cat"))}, id="numpy"),
    ],
)
def test_messages_are_accepted_in_these_forms(item: Any) -> None:
    [document] = rendered(handle(FAMILIES["gemma"]), item, field="talk")
    assert document.text == "".join(text for _, text in gemma_pieces(talk("the", "cat")))


def test_messages_are_read_from_every_kind_of_source(tmp_path: Path) -> None:
    tokenizer, items = (
        handle(FAMILIES["gemma"]),
        [{"messages": talk("the", "cat"), "n": 1}, {"messages": talk("on"), "n": 2}],
    )
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, items)))
    table = datasets.Dataset.from_list(items)
    table.to_parquet(str(tmp_path / "a.parquet"))
    for source in (tmp_path / "a.jsonl", tmp_path / "a.parquet", table, items):
        found = list(read_documents(source, chats=tokenizer.chats("messages")))
        assert found == list(read_documents(items, chats=tokenizer.chats("messages")))
        pieces = [gemma_pieces(talk("the", "cat")), gemma_pieces(talk("on"))]
        assert [one.text for one in found] == ["".join(text for _, text in of_one) for of_one in pieces]


def test_lone_surrogates_in_messages_are_replaced_and_counted() -> None:
    [document] = rendered(handle(FAMILIES["gemma"]), {"messages": talk("a\ud800"), "k": "\udc00"})
    assert document.n_replaced == 2
    assert "a\ufffd" in document.text


def test_fields_beside_the_content_are_the_templates_to_use() -> None:
    template = "{% for m in messages %}{{ m['name'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = TokenizerHandle.from_transformers(with_template(metaspace_transformers, template))
    [document] = rendered(tokenizer, [{"role": "user", "name": "cat", "content": "cat"}])
    assert document.text == "cat: cat\n"
    assert [(span.start, span.end) for span in document.messages] == [(5, 8)]


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        pytest.param({"text": "the"}, ["Document 1", "no field 'messages'", "text", "chat_field"], id="no_field"),
        pytest.param("the", ["Document 1", "type str"], id="text"),
        pytest.param({"messages": "the"}, ["Document 1", "type str"], id="messages_are_text"),
        pytest.param({"messages": []}, ["Document 1", "empty list"], id="no_messages"),
        pytest.param({"messages": None}, ["Document 1", "null"], id="null"),
        pytest.param({"messages": ["the"]}, ["Document 1", "type str", "message 1"], id="message_is_text"),
        pytest.param({"messages": [{"role": "user"}]}, ["no field 'content'", "message 1"], id="no_content"),
        pytest.param(
            {"messages": [*talk("the"), {"role": "assistant", "content": None}]},
            ["no field 'content'", "message 2"],
            id="null_content",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "the"}]}]},
            ["type list", "content", "message 1"],
            id="content_in_parts",
        ),
        pytest.param({"messages": [{"from": "bing", "value": "the"}]}, ["no field 'role'"], id="unknown_sender"),
        pytest.param(
            {"messages": [SHAREGPT[0] | {"content": "cat", "role": "user"}, SHAREGPT[1]]},
            ["no field 'role'", "message 2"],
            id="both_forms",
        ),
    ],
)
def test_what_is_no_chat_is_refused_by_name(item: Any, parts: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        rendered(handle(FAMILIES["gemma"]), item)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
