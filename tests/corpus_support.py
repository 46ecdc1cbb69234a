"""Tokenizers small enough to reason about, and a layout written with lists and loops to compare with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from actstore.blocks import TOKEN_FIELDS
from actstore.corpus import TokenizerHandle, Window

MERGES = [("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t"), ("o", "n")]
PIECES = ["a", "b", "c", "e", "h", "n", "o", "t", *("".join(pair) for pair in MERGES)]


@cache
def metaspace_transformers() -> Any:
    """Gemma's kind: spaces as marks, bytes as fallback, BOS; ids 0-3 special, 4-259 bytes, then pieces."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *PIECES, "▁the"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocab=vocabulary, merges=[*MERGES, ("▁", "the")], byte_fallback=True, unk_token="<unk>", fuse_unk=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


@cache
def byte_level_transformers() -> Any:
    """GPT-2's kind without BOS: id 0 is <eos>, ids 1-256 are bytes, id 300 leaves a hole before it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {letter: i + 1 for i, letter in enumerate(letters)}
    merges = [*MERGES, ("Ġ", "the"), ("Ã", "©"), ("Ġ", "Ã")]
    vocabulary |= {"".join(pair): 300 + i for i, pair in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_tokens([AddedToken("é|", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@cache
def metaspace() -> TokenizerHandle:
    return TokenizerHandle.from_transformers(metaspace_transformers())


@cache
def byte_level() -> TokenizerHandle:
    return TokenizerHandle.from_transformers(byte_level_transformers())


@dataclass
class ExpectedLayout:
    """What a layout should be: rows by number, one tuple per sequence, text tokens per document."""

    rows: dict[int, dict[str, int]] = field(default_factory=dict)
    sequences: list[tuple[int, int, int]] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)


def expected_layout(
    texts: list[str],
    tokenizer: TokenizerHandle,
    window: Window,
    shard_rows: int,
    *,
    first_doc: int = 0,
    first_seq: int = 0,
    first_shard: int = 0,
    max_tokens: int | None = None,
) -> ExpectedLayout:
    """Lay documents out one token after the other."""
    layout = ExpectedLayout()
    next_row = first_shard * shard_rows
    for doc, text in enumerate(texts, start=first_doc):
        if max_tokens is not None and len(layout.rows) >= max_tokens:
            break
        encoding = tokenizer.backend.encode(text, add_special_tokens=False)
        layout.n_tokens.append(len(encoding.ids))
        seen: set[int] = set()
        for members in _windows(len(encoding.ids), tokenizer, window):
            rows = _window_rows(members, encoding, tokenizer, seen)
            if next_row % shard_rows + len(rows) > shard_rows:
                next_row = (next_row // shard_rows + 1) * shard_rows
            layout.sequences.append((doc, next_row, len(rows)))
            for pos, row in enumerate(rows):
                layout.rows[next_row] = row | {"pos": pos, "seq": first_seq + len(layout.sequences) - 1, "role": -1}
                next_row += 1
            seen |= set(members)
    return layout


def _windows(n_tokens: int, tokenizer: TokenizerHandle, window: Window) -> list[list[int]]:
    full = window.context - (tokenizer.bos_id is not None)
    windows: list[list[int]] = []
    start = 0
    while n_tokens and not (windows and windows[-1][-1] == n_tokens - 1):
        windows.append(list(range(start, min(start + full, n_tokens))))
        start += window.stride or full
    return windows


def _window_rows(members: list[int], encoding: Any, tokenizer: TokenizerHandle, seen: set[int]) -> list[dict[str, int]]:
    rows = []
    if tokenizer.bos_id is not None:
        start = encoding.offsets[members[0]][0]
        rows.append({"token_id": tokenizer.bos_id, "char_start": start, "char_end": start, "flags": 1})
    for index in members:
        token_id, (start, end) = encoding.ids[index], encoding.offsets[index]
        flags = (1 if token_id in tokenizer.special_ids else 0) + (4 if index in seen else 0)
        rows.append({"token_id": token_id, "char_start": start, "char_end": end, "flags": flags})
    return rows


def row_values(row: dict[str, int]) -> list[int]:
    """Return a row of the reference in the order of the stored fields."""
    return [row[name] for name in TOKEN_FIELDS]


def token_bytes(text: str) -> bytes:
    """Return the bytes of a display text in which single bytes are written <0xE2>."""
    parts = re.split("(<0x[0-9A-F]{2}>)", text)
    return b"".join(bytes([int(part[3:5], 16)]) if i % 2 else part.encode() for i, part in enumerate(parts))
