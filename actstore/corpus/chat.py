"""Chats: documents made of messages, by the tokenizer's own template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actstore.errors import InvalidInput, explain

from .chat_template import ChatTemplate
from .document import Document, clean_metadata, kind_of
from .plain_json import SurrogateCount

__all__ = ["Chats"]

_FORMS = 'messages {"role": …, "content": …} with text in both, or all of them {"from": "human" or "gpt", "value": …}'
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Chats:
    """How items become documents: the field that holds their messages, and the template that writes them."""

    field: str
    template: ChatTemplate

    def document(self, item: Any, where: str) -> Document:
        """Return the document of an object with messages in its field, or of a list of messages.

        `where` is how a message calls the item. Raises InvalidInput where there are no messages, where the template
        refuses them, and where their contents cannot be told from it.
        """
        surrogates = SurrogateCount()
        given, others = self._parts(item, where)
        cleaned = clean_metadata({"messages": given, "metadata": others}, where, surrogates)
        text, spans = self.template.render(_messages(cleaned["messages"], where), where)
        return Document(text, cleaned["metadata"], surrogates.n_replaced, spans)

    def _parts(self, item: Any, where: str) -> tuple[Any, Mapping[str, Any]]:
        if isinstance(item, (list, tuple)):
            return item, {}
        if not isinstance(item, Mapping):
            what = f"{where} is {kind_of(item)}"
        elif self.field not in item:
            what = f"{where} has no field {self.field!r}; its fields are {', '.join(map(str, item)) or 'none'}"
        else:
            return item[self.field], {key: item[key] for key in item if key != self.field}
        accepted = f"an object with a list of messages in the field {self.field!r}"
        raise InvalidInput(
            explain(what, accepted=accepted, next_step="name the field that holds the messages (chat_field)")
        )


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    """Return messages with role and content; raises InvalidInput where one is neither of the accepted forms."""
    if not isinstance(value, list) or not value:
        raise _not_messages(f"{where} has {kind_of(value) if value != [] else 'an empty list'} in place of messages")
    # Datasets of Arrow have every field in every message, null where it is not meant; templates test what is there.
    given = [{key: one[key] for key in one if one[key] is not None} if isinstance(one, dict) else one for one in value]
    messages = [_renamed(one) for one in given] if all(map(_is_sharegpt, given)) else given
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise _not_messages(f"{where} has {kind_of(message)} as message {number}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = kind_of(message[key]) if key in message else f"no field {key!r}"
                raise _not_messages(f"{where} has {found} as {key} of message {number}")
    return messages


def _is_sharegpt(message: Any) -> bool:
    """Return whether a message says who and what in ShareGPT's words, by a sender whose role is known, and only so."""
    if not isinstance(message, dict) or not {"role", "content"}.isdisjoint(message):
        return False
    return "value" in message and isinstance(message.get("from"), str) and message["from"] in _SHAREGPT_ROLES


def _renamed(message: dict[str, Any]) -> dict[str, Any]:
    rest = {key: message[key] for key in message if key not in ("from", "value")}
    return rest | {"role": _SHAREGPT_ROLES[message["from"]], "content": message["value"]}


def _not_messages(what: str) -> InvalidInput:
    return InvalidInput(explain(what, accepted=_FORMS, next_step="change or remove that document"))
