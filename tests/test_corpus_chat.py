"""Chats: the template applied once, its tokens told from the messages', and what cannot be told refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from corpus_support import byte_level_transformers, metaspace_transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_world import RESIDUAL_SAE, extract, tiny_world
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import actstore
from actstore.blocks import FLAG_REPEAT, FLAG_SPECIAL, FLAG_TEMPLATE
from actstore.corpus import Document, DocumentsDigest, Roles, TokenizerHandle, Window, lay_out, read_documents
from actstore.errors import InvalidInput, RecipeMismatch
from actstore.extraction import Request, plan_extraction
from actstore.store import StoreReader, verify_store

Message = dict[str, Any]
Pieces = list[tuple[str | None, str]]  # whose content (None: the template's), and the text, in order

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system here') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Turns alternate: user, assistant') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set turn = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set turn = bos_token + turn %}{% endif %}{{ turn }}{% endfor %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


def with_template(make: Callable[[], Any], template: str | None, *special: str, **names: str) -> Any:
    """Return a tokenizer of the tests' own kinds with more special tokens and a chat template."""
    backend = Tokenizer.from_str(make().backend_tokenizer.to_str())
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


@cache
def gemma() -> Any:
    return with_template(
        metaspace_transformers, GEMMA, "<start_of_turn>", "<end_of_turn>", bos_token="<bos>", eos_token="<eos>"
    )


@cache
def llama_3() -> Any:
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    made = with_template(byte_level_transformers, LLAMA_3, *special, bos_token=special[0], eos_token=special[3])
    bos = [(special[0], made.bos_token_id)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=bos)
    return made


@cache
def chatml() -> Any:
    return with_template(byte_level_transformers, CHATML, "<|im_start|>", "<|im_end|>", eos_token="<|im_end|>")


@cache
def instruct() -> Any:
    """Sentencepiece's way: a blank is put before the text's first word only, so a dropped BOS would change ids."""
    made = with_template(metaspace_transformers, INSTRUCT, bos_token="<bos>", eos_token="<eos>")
    made.backend_tokenizer.normalizer = normalizers.NFC()
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


def gemma_pieces(messages: list[Message]) -> Pieces:
    pieces: Pieces = [(None, "<bos>")]
    for one in messages:
        name = {"assistant": "model"}.get(one["role"], one["role"])
        turn = [(None, f"<start_of_turn>{name}\n"), (one["role"], one["content"].strip()), (None, "<end_of_turn>\n")]
        pieces += turn
    return pieces


def llama_3_pieces(messages: list[Message]) -> Pieces:
    pieces: Pieces = [(None, "<|begin_of_text|>")]
    for one in messages:
        pieces += [(None, f"<|start_header_id|>{one['role']}<|end_header_id|>\n\n")]
        pieces += [(one["role"], one["content"].strip()), (None, "<|eot_id|>")]
    return pieces


def chatml_pieces(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    if messages[0]["role"] != "system":
        pieces += [(None, "<|im_start|>system\nBe kind.<|im_end|>\n")]
    for one in messages:
        pieces += [(None, f"<|im_start|>{one['role']}\n"), (one["role"], one["content"]), (None, "<|im_end|>\n")]
    return pieces


def instruct_pieces(messages: list[Message]) -> Pieces:
    pieces: Pieces = [(None, "<bos>")]
    for one in messages:
        if one["role"] == "user":
            pieces += [(None, "[INST] "), ("user", one["content"]), (None, " [/INST]")]
        else:
            pieces += [(None, " "), (one["role"], one["content"].strip()), (None, "<eos>")]
    return pieces


@dataclass(frozen=True)
class Family:
    tokenizer: Callable[[], Any]
    pieces: Callable[[list[Message]], Pieces]
    system: bool = True


FAMILIES = {
    "gemma": Family(gemma, gemma_pieces, system=False),
    "llama_3": Family(llama_3, llama_3_pieces),
    "chatml": Family(chatml, chatml_pieces),
    "instruct": Family(instruct, instruct_pieces, system=False),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def talk(*contents: str, system: str | None = None) -> list[Message]:
    """Return a chat in which user and assistant take turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": one} for i, one in enumerate(contents)]


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


def handle(family: Family) -> TokenizerHandle:
    return TokenizerHandle.from_transformers(family.tokenizer())


def rendered(tokenizer: TokenizerHandle, *items: Any, field: str = "messages") -> list[Document]:
    return list(read_documents(list(items), chats=tokenizer.chats(field)))


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


def expected_role(pieces: Pieces, start: int, end: int) -> str | None:
    """Return the role of a token by asking each of its characters: the first that belongs to a content."""
    owners = [role for role, text in pieces for _ in text]
    return next((role for role in owners[start : max(end, start + 1)] if role is not None), None)


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


NO_BOS_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


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


# What a chat may look like


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
    expected = rendered(tokenizer, *items)
    for source in (tmp_path / "a.jsonl", tmp_path / "a.parquet", table, items):
        assert list(read_documents(source, chats=tokenizer.chats("messages"))) == expected


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


# Templates that refuse, drop, repeat, change


def one_template(template: Any) -> TokenizerHandle:
    return TokenizerHandle.from_transformers(with_template(metaspace_transformers, template, bos_token="<bos>"))


@pytest.mark.parametrize(
    ("template", "messages", "parts"),
    [
        pytest.param(GEMMA, talk("the", system="a"), ["the chat template says 'No system here'"], id="no_system"),
        pytest.param(GEMMA, talk("the")[:1] * 2, ["Turns alternate: user, assistant"], id="turns_alternate"),
        pytest.param("{{ nothing['at all'] }}", talk("the"), ["cannot be rendered", "nothing"], id="undefined"),
        pytest.param("{% for %}", talk("the"), ["cannot be rendered"], id="syntax"),
        pytest.param(
            "{{ messages.__class__.__mro__ }}", talk("the"), ["cannot be rendered", "unsafe"], id="out_of_the_sandbox"
        ),
        pytest.param(
            "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}\n{% endif %}{% endfor %}",
            talk("the", system="a"),
            ["leaves out message 1 (system)"],
            id="drops_system",
        ),
        pytest.param(
            "{{ messages[-1]['content'] }}", talk("the", "cat"), ["leaves out message 1 (user)"], id="only_last"
        ),
        pytest.param(
            "{% for m in messages %}{{ m['content'] }} {{ m['content'] }}{% endfor %}",
            talk("the"),
            ["twice or more message 1 (user)"],
            id="repeats",
        ),
        pytest.param(
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            talk("the"),
            ["leaves out"],
            id="upper_case",
        ),
        pytest.param(
            "{% for m in messages %}{{ m['content'] | replace('the', 'a') }}\n{% endfor %}",
            talk("the"),
            ["changes or removes"],
            id="replaces",
        ),
        pytest.param(
            "{% for m in messages %}{{ m['content'].split('</think>')[-1] }}\n{% endfor %}",
            talk("the", "no</think>cat"),
            ["changes or removes"],
            id="removes_thoughts",
        ),
        pytest.param(
            "{% for m in messages %}{% if m['content'] %}{{ m['role'] + m['content'] }}{% endif %}{% endfor %}",
            talk("the", ""),
            ["changes or removes"],
            id="skips_empty_turns",
        ),
        pytest.param(
            "{% for m in messages %}{{ m['content'] | trim if loop.first else m['content'] }}{% endfor %}",
            talk(" ", " "),
            ["changes or removes"],
            id="ambiguous",
        ),
        pytest.param(
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ 'Qx7Content000009Zq' }}",
            talk("the"),
            ["a content that no message has"],
            id="forged_mark",
        ),
    ],
)
def test_a_chat_that_cannot_be_told_from_its_template_is_refused_by_name(
    template: str, messages: list[Message], parts: list[str]
) -> None:
    with pytest.raises(InvalidInput) as caught:
        rendered(one_template(template), messages)
    message = str(caught.value)
    assert message.startswith("Document 1 ")
    assert all(part in message for part in parts), message


def test_messages_that_a_template_writes_in_another_order_are_found_there() -> None:
    template = "{% for m in messages | reverse %}{{ m['role'] }}={{ m['content'] }};{% endfor %}"
    [document] = rendered(one_template(template), talk("the", "the"))
    found = [(span.role, span.start, document.text[span.start : span.end]) for span in document.messages]
    assert found == [("assistant", 10, "the"), ("user", 19, "the")]


def test_many_ways_to_take_a_text_apart_end_soon() -> None:
    with pytest.raises(InvalidInput, match="could be elsewhere"):
        rendered(one_template("{% for m in messages %}{{ m['content'] }}{% endfor %}"), talk(*["\n"] * 40, *[" "] * 40))


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        pytest.param(None, ["no chat template", "--tokenizer"], id="none"),
        pytest.param({"rag": CHATML, "tool_use": CHATML}, ["several", "default"], id="no_default"),
    ],
)
def test_a_tokenizer_without_a_template_is_refused_with_the_next_step(template: Any, parts: list[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        one_template(template).chats("messages")
    assert all(part in str(caught.value) for part in parts)


def test_the_default_of_several_templates_is_taken() -> None:
    [document] = rendered(one_template({"default": NO_BOS_TEMPLATE, "rag": CHATML}), talk("the"))
    assert document.text == "user: the\n"


@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}x{% endif %}"], ids=["nothing", "line", "indented_block"])
def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day(start: str) -> None:
    body = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    asking = start + "{{ strftime_now('%d %b %Y') if strftime_now is defined }}|{{ strftime_now('%Y-%m-%d') }}|" + body
    told = start + "26 Jul 2024|2024-07-26|" + body
    assert rendered(one_template(asking), talk("the")) == rendered(one_template(told), talk("the"))


def test_another_template_makes_another_corpus_and_plain_text_keeps_its_digest() -> None:
    def digest(documents: list[Document]) -> str:
        made = DocumentsDigest()
        for document in documents:
            made.update(document)
        return made.hexdigest()

    chats = rendered(handle(FAMILIES["chatml"]), talk("the", "cat"))
    silent = rendered(one_template(CHATML.replace("Be kind.", "Be brief.")), talk("the", "cat"))
    plain = [replace(one, messages=()) for one in chats]
    renamed = [replace(one, messages=tuple(replace(span, role="user") for span in one.messages)) for one in chats]
    assert len({digest(one) for one in (chats, silent, plain, renamed)}) == 4
    batches = lay_out(chats, handle(FAMILIES["chatml"]), Window(16), shard_rows=64)
    laid_out: Any = [row for batch in batches for row in batch.documents]
    assert digest(laid_out) == digest(chats)


# Whole extractions

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
