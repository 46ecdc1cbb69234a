"""Chat templates that refuse, drop, repeat or change: refused where a content cannot be told from its template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from chat_support import CHATML, FAMILIES, GEMMA, NO_BOS_TEMPLATE, Message, handle, one_template, rendered, talk

from actstore.corpus import Document, DocumentsDigest, Window, lay_out
from actstore.errors import InvalidInput


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
