"""The display text of tokens, by the rules that the tokenizer itself states.

Three spellings are undone: spaces written as a mark (`▁`), bytes written as the 256 letters of the byte-level
alphabet, and bytes written as `<0x0A>`. Which of them apply is read from the tokenizer's decoder, pre-tokenizer,
normalizer and model, never from its name.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

__all__ = ["Spelling", "display_vocabulary"]

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_UNDECODED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each letter: bytes with a visible Latin-1 character are that letter, others follow U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = _byte_level_alphabet()


@dataclass(frozen=True)
class Spelling:
    """How a tokenizer spells text in its tokens."""

    byte_level: bool
    byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]  # (in the token, in the text)

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Spelling:
        """Return the spelling of a tokenizer, given the content of its `tokenizer.json`."""
        decoders = list(_components(description.get("decoder")))
        splitters = list(_components(description.get("pre_tokenizer")))
        normalizers = list(_components(description.get("normalizer")))
        kinds = {part["type"] for part in (*decoders, *splitters, *normalizers)}
        marks = {part["replacement"]: " " for part in (*splitters, *decoders) if part["type"] == "Metaspace"}
        marks |= {
            part["pattern"]["String"]: part["content"]
            for part in decoders
            if part["type"] == "Replace" and "String" in part["pattern"]
        }
        fallback = "ByteFallback" in kinds or bool(description["model"].get("byte_fallback"))
        return cls("ByteLevel" in kinds, fallback, tuple(marks.items()))

    def text_of(self, token: str) -> str:
        """Return the text of one token; a byte that is no character by itself is shown as `<0xE2>`."""
        if self.byte_level:
            return _byte_level_text(token)
        if self.byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return _byte_text(int(byte[1], 16))
        for mark, text in self.replacements:
            token = token.replace(mark, text)
        return token


def display_vocabulary(
    description: Mapping[str, Any], vocabulary: Mapping[str, int], special_ids: Set[int]
) -> list[str]:
    """Return the display text of every id from 0 to the largest; ids without a token get "".

    A byte's token is shown as its character only where no ordinary token is.
    Special tokens stay as they are; so do all added tokens of a byte-level tokenizer, which holds them as plain text.
    """
    spelling = Spelling.of(description)
    added = {token["id"] for token in description.get("added_tokens", ())}
    verbatim = special_ids | added if spelling.byte_level else special_ids
    texts = [""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        texts[token_id] = token if token_id in verbatim else spelling.text_of(token)
    if spelling.byte_fallback:
        _tell_bytes_apart(texts, vocabulary)
    return texts


def _tell_bytes_apart(texts: list[str], vocabulary: Mapping[str, int]) -> None:
    """Show `<0x41>` as it is spelled where an ordinary token is shown as "A": the byte's token is then never used."""
    bytes_ids = {token_id for token, token_id in vocabulary.items() if _BYTE_TOKEN.fullmatch(token)}
    ordinary = {text for token_id, text in enumerate(texts) if token_id not in bytes_ids}
    for token, token_id in vocabulary.items():
        if token_id in bytes_ids and texts[token_id] in ordinary:
            texts[token_id] = token


def _components(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for key in ("decoders", "pretokenizers", "normalizers"):
        for inner in part.get(key, ()):
            yield from _components(inner)


def _byte_level_text(token: str) -> str:
    if any(letter not in _ALPHABET for letter in token):
        return token
    data = bytes(_ALPHABET[letter] for letter in token)
    if len(data) == 1:
        return _byte_text(data[0])
    text = data.decode("utf-8", errors="surrogateescape")
    return _UNDECODED.sub(lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)


def _byte_text(byte: int) -> str:
    return chr(byte) if chr(byte) in string.printable else f"<0x{byte:02X}>"
