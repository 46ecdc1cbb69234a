"""Whole extractions of chats: roles in SQL, statistics without templates, resuming and appending."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_support import Message, Pieces, expected_role, talk, with_template
from corpus_support import metaspace_transformers
from tiny_world import RESIDUAL_SAE, extract, tiny_world

import actstore
from actstore.errors import InvalidInput, RecipeMismatch
from actstore.extraction import Request, plan_extraction
from actstore.store import StoreReader, verify_store

# The words of this template are in the tiny world's vocabulary, so that its model and SAEs can be used.
TINY = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('No system') }}"
    "{% endif %}{{ 'on ' + message['role'] + '\n' + message['content'] | trim + '<eos>\n' }}{% endfor %}"
)
TALKS: list[dict[str, Any]] = [
    {"messages": talk("the cat on the hat then", "not that boat " * 12), "source": "a"},
    {"messages": talk("the", "the", "tea 🐈 é", ""), "source": "b"},
    {"messages": talk("each coat on a note", "the cat"), "source": "c"},
]


def tiny_tokenizer(template: str = TINY) -> Any:
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return with_template(metaspace_transformers, template, **special)


LITTLE: dict[str, Any] = {"saes": [], "lens_k": 0, "lens_sites": [], "predictions": False, "with_index": False}


def extract_chats(out: Path, **changes: Any) -> Any:
    options = {"dataset": TALKS, "chat_field": "messages", "tokenizer": tiny_tokenizer()}
    return extract(out, tiny_world(), **(options | changes))


@pytest.fixture(scope="module")
def chat_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chats") / "chats.act"
    extract_chats(out)
    return out


def tiny_pieces(messages: list[Message]) -> Pieces:
    pieces: Pieces = [(None, "<bos>")]
    for one in messages:
        pieces += [(None, f"on {one['role']}\n"), (one["role"], one["content"].strip()), (None, "<eos>\n")]
    return pieces


def test_a_store_of_chats_says_of_every_token_whose_it_is(chat_store: Path) -> None:
    store = actstore.open(chat_store)
    for doc, item in enumerate(TALKS):
        pieces = tiny_pieces(item["messages"])
        [document] = store.sql(f"SELECT text, metadata FROM documents WHERE doc = {doc}").rows()
        assert document["text"] == "".join(text for _, text in pieces)
        assert json.loads(document["metadata"]) == {"source": item["source"]}
        tokens = store.sql(
            "SELECT role, is_template, token, char_start, char_end FROM tokens "
            f"WHERE doc = {doc} AND pos > 0 AND NOT is_repeat ORDER BY row"
        ).rows()
        for token in tokens:
            assert token["role"] == expected_role(pieces, token["char_start"], token["char_end"]), token
            assert token["is_template"] == (token["role"] is None), token


def test_every_sequence_of_a_chat_begins_with_one_bos(chat_store: Path) -> None:
    store = actstore.open(chat_store)
    [counted] = store.sql(
        "SELECT count(*) AS n, count(DISTINCT seq) AS n_seqs, "
        "bool_and(pos = 0 AND is_special AND NOT is_template AND role IS NULL) AS is_bos "
        "FROM tokens WHERE token = '<bos>'"
    ).rows()
    n_seqs = store.sql("SELECT count(*) FROM sequences").scalar()
    assert (counted["n"], counted["n_seqs"], counted["is_bos"]) == (n_seqs, n_seqs, True)
    assert n_seqs > len(TALKS)


def test_statistics_of_features_leave_templates_out(chat_store: Path) -> None:
    store = actstore.open(chat_store)
    plain = "NOT (is_special OR is_template OR is_repeat)"
    counted = store.sql(
        f"SELECT a.feature, count(*) AS n FROM activations a JOIN tokens t USING (row) "
        f"WHERE a.sae = '{RESIDUAL_SAE}' AND t.role IS NOT NULL AND {plain} GROUP BY 1"
    ).rows()
    expected = {row["feature"]: row["n"] for row in counted}
    told = store.sql(f"SELECT feature, n_firings FROM features WHERE sae = '{RESIDUAL_SAE}' AND n_firings > 0").rows()
    assert {row["feature"]: row["n_firings"] for row in told} == expected
    on_template = "SELECT count(*) FROM activations JOIN tokens USING (row) WHERE is_template"
    assert store.sql(on_template).scalar() > 0
    assert store.sql("SELECT count(*) FROM examples JOIN tokens USING (row) WHERE is_template").scalar() == 0


def test_snippets_show_the_rendered_text(chat_store: Path) -> None:
    store = actstore.open(chat_store)
    found = "SELECT snippet(row, 2, 1) FROM tokens WHERE doc = 0 AND role = 'user' ORDER BY row LIMIT 1"
    assert store.sql(found).scalar() == "r\n«the» "


def test_the_same_command_resumes_and_another_template_is_refused(chat_store: Path) -> None:
    assert extract_chats(chat_store).n_shards_made == 0
    other = tiny_tokenizer(TINY.replace("'on '", "'then '"))
    with pytest.raises(RecipeMismatch, match="documents_digest"):
        extract_chats(chat_store, tokenizer=other)
    assert verify_store(chat_store).faults == []


def test_chats_and_texts_are_appended_and_roles_keep_their_codes(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract_chats(out, dataset=TALKS[:1], **LITTLE)
    more = [{"messages": [{"role": "tool", "content": "tea"}, {"role": "user", "content": "ace"}]}]
    extract_chats(out, dataset=None, append=[{"text": "the cat"}], chat_field=None, **LITTLE)
    extract_chats(out, dataset=None, append=more, **LITTLE)
    again = extract_chats(out, dataset=None, append=more, **(LITTLE | {"with_index": True}))
    assert again.n_shards_made == 0  # the last segment is this very data
    store = actstore.open(out)
    roles = store.sql("SELECT doc, role FROM tokens WHERE NOT is_template AND pos > 0 GROUP BY ALL ORDER BY ALL").rows()
    assert [tuple(row.values()) for row in roles] == [
        (0, "assistant"),
        (0, "user"),
        (1, None),
        (2, "tool"),
        (2, "user"),
    ]
    assert StoreReader(out).tables()["roles"] == [
        {"code": 0, "role": "user"},
        {"code": 1, "role": "assistant"},
        {"code": 2, "role": "tool"},
    ]


def test_chats_of_another_template_are_not_appended(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract_chats(out, dataset=TALKS[:1], **LITTLE)
    other = tiny_tokenizer(TINY.replace("'on '", "'then '"))
    with pytest.raises(RecipeMismatch, match=r"segment 0 .*chat template.*another --out"):
        extract_chats(out, dataset=None, append=TALKS[1:], tokenizer=other, **LITTLE)
    assert len(StoreReader(out).layout.segments) == 1
    assert verify_store(out).faults == []


def test_a_template_that_raises_stops_before_anything_is_stored(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(json.dumps({"messages": one}) for one in (talk("the"), talk("the", system="be"))))
    with pytest.raises(InvalidInput, match=r"a\.jsonl, line 2, cannot be rendered: the chat template says 'No system'"):
        extract_chats(out, dataset=data, **LITTLE)
    assert extract_chats(out, **LITTLE).complete  # the same place serves for a corpus that can be read


def test_a_tokenizer_without_template_is_refused_before_a_store_is_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no chat template.*chat_template\.jinja"):
        extract_chats(tmp_path / "a.act", tokenizer=None)
    assert not (tmp_path / "a.act").exists()


def test_the_plan_counts_the_templates_tokens(chat_store: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": tiny_world().model, "tokenizer": tiny_tokenizer(), "sites": ("resid_post.1",)}
    options |= {"dataset": TALKS, "chat_field": "messages", "context": 24, "shard_rows": 64}
    plan = plan_extraction(Request(out=tmp_path / "a.act", **options))
    layout = StoreReader(chat_store).layout
    assert (plan.n_documents, plan.n_rows, plan.n_shards) == (layout.n_docs, layout.n_rows, layout.n_shards)
