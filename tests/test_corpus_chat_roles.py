"""Chats: the template applied once, and of every token it is told whose it is, in every window."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from chat_support import (
    FAMILIES,
    NO_BOS_TEMPLATE,
    Family,
    Message,
    expected_role,
    handle,
    rendered,
    talk,
    with_template,
)
from corpus_support import metaspace_transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from actstore.blocks import FLAG_REPEAT, FLAG_SPECIAL, FLAG_TEMPLATE
from actstore.corpus import Document, Roles, TokenizerHandle, Window, lay_out

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
CHATS = {
    "short": talk("the cat", "on the hat"),
    "one_message": talk("then"),
    "same_contents": talk("the", "the", "the", "the"),
    "content_is_a_role": talk("user", "model", "assistant"),
    "content_in_content": talk("the cat on the cat", "cat"),
    "empty": talk("", "the", ""),
    "only_blanks": talk(" \n ", "\t"),
    "blanks_at_the_ends": talk("  the \n", "\n\n cat\t "),
    "unicode": talk("naïve 🐈‍⬛ e\u0301", "日本語\u2003"),
    "template_words_in_content": talk("[INST] system\n", "Be kind. <end_of_turn>\n<|im_end|>\n"),
    "many": talk(*["the cat", "on"] * 15),
}


def rows_of(
    tokenizer: TokenizerHandle, documents: list[Document], context: int = 4096, stride: int | None = None
) -> Any:
    """Return sequences and the used rows of a layout as one table, and the roles."""
    roles = Roles()
    batches = list(lay_out(documents, tokenizer, Window(context, stride), shard_rows=8192, roles=roles))
    sequences = np.concatenate([batch.sequences for batch in batches])
    shards = [shard for batch in batches for shard in batch.shards]
    columns = {
        name: np.concatenate([shard.column(name)[: shard.n_rows] for shard in shards])
        for name in ("token_id", "seq", "pos", "char_start", "char_end", "flags", "role")
    }
    return sequences, columns, roles


@every_family
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS.keys())
def test_rows_are_the_templates_tokens_with_one_bos_and_each_content_has_its_role(
    family: Family, messages: list[Message]
) -> None:
    tokenizer, pieces = handle(family), family.pieces(messages)
    [document] = rendered(tokenizer, {"messages": messages, "n": 1})
    assert document.text == "".join(text for _, text in pieces)
    assert dict(document.metadata) == {"n": 1}
    assert [(span.role, document.text[span.start : span.end]) for span in document.messages] == [
        (role, text) for role, text in pieces if role is not None
    ]
    _, rows, roles = rows_of(tokenizer, [document])
    ordinary = family.tokenizer().apply_chat_template(messages, tokenize=True)["input_ids"]
    assert rows["token_id"].tolist() == ordinary
    assert (rows["token_id"] == tokenizer.bos_id).sum() == (tokenizer.bos_id is not None)
    for place, (start, end) in enumerate(zip(rows["char_start"], rows["char_end"], strict=True)):
        is_bos = place == 0 and tokenizer.bos_id is not None
        role = None if is_bos else expected_role(pieces, int(start), int(end))
        assert (roles.names[rows["role"][place]] if rows["role"][place] >= 0 else None) == role
        assert bool(rows["flags"][place] & FLAG_TEMPLATE) == (role is None and not is_bos)
        is_special = int(rows["token_id"][place]) in tokenizer.special_ids
        assert bool(rows["flags"][place] & FLAG_SPECIAL) == is_special


texts = st.text(alphabet="the cat\n\t[]<>|é🙂", max_size=12)


@every_family
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(texts, min_size=1, max_size=5), system=st.none() | texts)
def test_any_contents_are_found(family: Family, contents: list[str], system: str | None) -> None:
    messages = talk(*contents, system=system if family.system else None)
    [document] = rendered(handle(family), messages)
    expected = [(role, text) for role, text in family.pieces(messages) if role is not None]
    assert [(one.role, document.text[one.start : one.end]) for one in document.messages] == expected


@pytest.mark.parametrize(("context", "stride"), [(9, None), (9, 5)], ids=["no_overlap", "overlap"])
@every_family
def test_roles_and_flags_survive_windows(family: Family, context: int, stride: int | None) -> None:
    tokenizer = handle(family)
    documents = rendered(tokenizer, CHATS["many"], CHATS["unicode"])
    _, whole, _ = rows_of(tokenizer, documents)
    sequences, cut, _ = rows_of(tokenizer, documents, context, stride)
    n_bos = int(tokenizer.bos_id is not None)
    is_text = cut["pos"] >= n_bos
    fresh = is_text & (cut["flags"] & FLAG_REPEAT == 0)
    for name in ("token_id", "char_start", "char_end", "flags", "role"):
        assert cut[name][fresh].tolist() == whole[name][whole["pos"] >= n_bos].tolist()
    assert (cut["flags"][~is_text] == FLAG_SPECIAL).all()
    assert (cut["role"][~is_text] == -1).all()
    assert (np.bincount(cut["seq"][~is_text], minlength=len(sequences)) == n_bos).all()


def test_a_token_with_one_character_of_a_content_is_the_contents() -> None:
    tokenizer = TokenizerHandle.from_transformers(
        with_template(
            metaspace_transformers, "{% for m in messages %}th{{ m['content'] }}{% endfor %}", eos_token="<eos>"
        )
    )
    documents = rendered(tokenizer, talk("e ca", "e"))
    assert documents[0].text == "the cathe"
    _, rows, roles = rows_of(tokenizer, documents)
    spans = list(zip(rows["char_start"].tolist(), rows["char_end"].tolist(), rows["role"].tolist(), strict=True))
    assert roles.names == ["user", "assistant"]
    # Both "the" are the template's "th" and a content's "e".
    assert spans == [(0, 3, 0), (3, 4, 0), (4, 6, 0), (6, 9, 1)]


def test_a_template_without_bos_gets_the_one_that_the_tokenizer_adds_by_itself() -> None:
    adding = with_template(metaspace_transformers, NO_BOS_TEMPLATE, bos_token="<bos>")
    silent = copy.deepcopy(adding)
    silent.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    for made, n_bos in ((adding, 1), (silent, 0)):
        tokenizer = TokenizerHandle.from_transformers(made)
        _, rows, _ = rows_of(tokenizer, rendered(tokenizer, talk("the cat", "on")))
        assert (rows["token_id"] == tokenizer.bos_id).sum() == n_bos
        assert rows["token_id"].tolist() == made("user: the cat\nassistant: on\n")["input_ids"]


def test_a_bos_that_a_message_begins_with_is_its_content() -> None:
    silent = with_template(metaspace_transformers, "{{ messages[0]['content'] }}", bos_token="<bos>")
    tokenizer = TokenizerHandle.from_transformers(silent)
    _, rows, _ = rows_of(tokenizer, rendered(tokenizer, talk("<bos>the")))
    assert rows["role"].tolist() == [-1, 0, 0]
    assert rows["token_id"].tolist()[:2] == [tokenizer.bos_id] * 2


def test_chats_and_plain_texts_may_be_in_one_batch() -> None:
    tokenizer = handle(FAMILIES["gemma"])
    documents = [Document("the cat"), *rendered(tokenizer, talk("the cat")), Document("the")]
    sequences, rows, _ = rows_of(tokenizer, documents)
    assert sequences[:, 0].tolist() == [0, 1, 2]
    is_plain_text = rows["seq"] != 1
    assert (rows["flags"][is_plain_text] & FLAG_TEMPLATE == 0).all()
    assert (rows["role"][is_plain_text] == -1).all()
    assert (rows["role"][rows["seq"] == 1] == 0).any()
