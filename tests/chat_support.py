"""Chat templates of four families, the pieces that each must render to, and chats read by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from corpus_support import byte_level_transformers, metaspace_transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from actstore.corpus import Document, TokenizerHandle, read_documents

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


NO_BOS_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def talk(*contents: str, system: str | None = None) -> list[Message]:
    """Return a chat in which user and assistant take turns."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": one} for i, one in enumerate(contents)]


def handle(family: Family) -> TokenizerHandle:
    return TokenizerHandle.from_transformers(family.tokenizer())


def one_template(template: Any) -> TokenizerHandle:
    return TokenizerHandle.from_transformers(with_template(metaspace_transformers, template, bos_token="<bos>"))


def rendered(tokenizer: TokenizerHandle, *items: Any, field: str = "messages") -> list[Document]:
    return list(read_documents(list(items), chats=tokenizer.chats(field)))


def expected_role(pieces: Pieces, start: int, end: int) -> str | None:
    """Return the role of a token by asking each of its characters: the first that belongs to a content."""
    owners = [role for role, text in pieces for _ in text]
    return next((role for role in owners[start : max(end, start + 1)] if role is not None), None)
