"""A tokenizer's chat template: what it makes of messages, and where in that each content is.

The template is run by transformers, in its sandbox. It is a program that may trim, reorder, repeat or drop: so the
places are not looked for in the text. The same messages are rendered once more with marks for contents; what stands
between the marks is the template's own, and the text must be exactly these pieces with the contents between them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from actstore.errors import InvalidInput, MissingDependency, explain
from actstore.sealed import canonical_json

from .document import MessageSpan

__all__ = ["ChatTemplate"]

Message = Mapping[str, Any]
Places = tuple[tuple[int, int], ...]

_MARK = re.compile(r"Qx7Content(\d{6})Zq")
_MOST_PATHS = 64  # ways in which a text may be taken apart before it counts as ambiguous
_CACHED_PIECES = 256
# A text with today's date would be another corpus tomorrow: it gets the date that Llama 3's template falls back on.
_DATE = {"d": "26", "-d": "26", "m": "07", "b": "Jul", "B": "July", "y": "24", "Y": "2024", "a": "Fri", "A": "Friday"}
_TIME = {"H": "00", "M": "00", "S": "00"}


class ChatTemplate:
    """The template of one tokenizer; `digest` is the SHA-256 of its text."""

    def __init__(self, tokenizer: Any) -> None:
        """Take the template of a loaded Hugging Face tokenizer, the one named `default` where it has several.

        Raises InvalidInput where it has none.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise _no_template("The tokenizer has no chat template")
        try:
            source = str(tokenizer.get_chat_template())
        except ValueError:
            raise _no_template("The tokenizer has several chat templates and none is named default") from None
        self.digest = hashlib.sha256(source.encode(errors="replace")).hexdigest()
        self._tokenizer = tokenizer
        self._source = _fixed_date() + source if "strftime_now" in source else source
        self._pieces = lru_cache(_CACHED_PIECES)(self._find_pieces)

    def render(self, messages: Sequence[Message], where: str) -> tuple[str, tuple[MessageSpan, ...]]:
        """Return the text of messages, and the spans of their contents in order of the text.

        messages: JSON objects with `role` and `content`, both text; other fields are the template's to use.
        Raises InvalidInput where the template refuses them, and where the contents are not all in the text, once each
        and whole but for blanks at their ends, in exactly one way.
        """
        skeleton = [{key: value for key, value in message.items() if key != "content"} for message in messages]
        try:
            text = self._run(messages)
            order, pieces = self._pieces(canonical_json(skeleton))
        except ImportError as error:
            raise MissingDependency(explain(f"Chat templates cannot be run ({error})")) from error
        except Exception as error:  # the template is somebody's program: anything may come out of it
            raise _not_rendered(where, error) from error
        if sorted(order) != list(range(len(messages))):
            raise _not_found(where, _first_fault(order, messages))
        places = _places(text, pieces, [messages[number]["content"] for number in order])
        if places is None:
            raise _not_found(where, "changes or removes a part of a message, or writes it where it could be elsewhere")
        roles = [messages[number]["role"] for number in order]
        return text, tuple(MessageSpan(role, *place) for role, place in zip(roles, places, strict=True))

    def _find_pieces(self, skeleton: bytes) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return whose contents a text holds, in its order, and what the template writes before, between and after."""
        messages = [
            {**message, "content": f"Qx7Content{number:06d}Zq"} for number, message in enumerate(json.loads(skeleton))
        ]
        parts = _MARK.split(self._run(messages))
        return tuple(map(int, parts[1::2])), tuple(parts[::2])

    def _run(self, messages: Sequence[Message]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, chat_template=self._source, tokenize=False, add_generation_prompt=False
        )
        return text


def _places(text: str, pieces: Sequence[str], contents: Sequence[str]) -> Places | None:
    """Return start and end of every content, where `text` is the pieces with the contents between them in one way."""
    paths: list[tuple[int, Places]] = [(len(pieces[0]), ())] if text.startswith(pieces[0]) else []
    for content, piece in zip(contents, pieces[1:], strict=True):
        steps = [
            (start, start + len(trimmed), places)
            for start, places in paths
            for trimmed in _trimmed(content)
            if text.startswith(trimmed, start) and text.startswith(piece, start + len(trimmed))
        ]
        if len(steps) > _MOST_PATHS:
            return None
        paths = [(end + len(piece), (*places, (start, end))) for start, end, places in steps]
    complete = [places for end, places in paths if end == len(text)]
    return complete[0] if len(complete) == 1 else None


def _trimmed(content: str) -> dict[str, None]:
    """Return a content as templates write it: whole, or without blanks or line ends at either end."""
    whole = (content, content.strip(), content.lstrip(), content.rstrip())
    return dict.fromkeys((*whole, content.strip("\n"), content.lstrip("\n"), content.rstrip("\n")))


def _first_fault(order: Sequence[int], messages: Sequence[Message]) -> str:
    for number, message in enumerate(messages):
        if (times := order.count(number)) != 1:
            what = "writes twice or more" if times else "leaves out"
            return f"{what} message {number + 1} ({message['role']})"
    return "writes a content that no message has"


def _fixed_date() -> str:
    """Return a macro that answers for transformers' `strftime_now`; its line end goes with it (`trim_blocks`)."""
    replacements = "".join(f"|replace('%{key}','{value}')" for key, value in (_DATE | _TIME).items())
    return "{% macro strftime_now(format) %}{{ format" + replacements + " }}{% endmacro %}\n"


def _no_template(what: str) -> InvalidInput:
    return InvalidInput(
        explain(
            what,
            accepted="the tokenizer of a chat model",
            next_step="give one with --tokenizer, or put its chat_template.jinja into the model's folder",
        )
    )


def _not_rendered(where: str, error: Exception) -> InvalidInput:
    message = " ".join(str(error).split()) or type(error).__name__
    return InvalidInput(
        explain(
            f"{where} cannot be rendered: the chat template says {message!r}",
            accepted="messages in the order and with the roles that the model was trained on",
            next_step="change or remove that document",
        )
    )


def _not_found(where: str, what: str) -> InvalidInput:
    return InvalidInput(
        explain(
            f"{where} cannot be told from its template: the chat template {what}",
            accepted="chats whose messages are all in the text, once each and whole",
            next_step="change or remove that document",
        )
    )
