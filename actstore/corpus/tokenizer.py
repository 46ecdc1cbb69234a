"""Tokenizers: loading, the facts that identify them, and text to ids with offsets. The one home of `tokenizers`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actstore.errors import InvalidInput, MissingInput, explain
from actstore.sealed import digest_of

from .chat import Chats
from .chat_template import ChatTemplate
from .vocabulary import display_vocabulary

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["NO_ROLE", "EncodedTexts", "TokenizerHandle", "load_tokenizer"]

NO_ROLE = -1
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class EncodedTexts:
    """Several texts as tokens, one after the other, nothing added.

    ids int32 (token); char_start, char_end int32 (token), code points in the text; n_tokens int64 (text); n_bos int64
    (text): 1 where its windows begin with BOS; flags int32 (token), what is known of it before windows; role int32
    (token): its code, NO_ROLE outside of a chat's messages.
    """

    ids: npt.NDArray[np.int32]
    char_start: npt.NDArray[np.int32]
    char_end: npt.NDArray[np.int32]
    n_tokens: npt.NDArray[np.int64]
    n_bos: npt.NDArray[np.int64]
    flags: npt.NDArray[np.int32]
    role: npt.NDArray[np.int32]

    def first(self, n_texts: int) -> EncodedTexts:
        """Return the first texts only; all of them where there are fewer."""
        n_tokens = int(self.n_tokens[:n_texts].sum())
        of_texts = ("n_tokens", "n_bos")
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return EncodedTexts(**{key: value[: n_texts if key in of_texts else n_tokens] for key, value in values.items()})


@dataclass(frozen=True)
class TokenizerHandle:
    """A fast tokenizer with the facts that determine its rows; equal where these are equal."""

    backend: Tokenizer = field(repr=False, compare=False)
    digest: str  # sha256 over the tokenizer's own serialisation, the BOS id and the special ids
    bos_id: int | None
    pad_id: int | None
    special_ids: frozenset[int]
    vocabulary_size: int  # largest id + 1
    source: Any = field(default=None, repr=False, compare=False)  # the Hugging Face tokenizer, for its chat template

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> TokenizerHandle:
        """Return the handle of a loaded Hugging Face tokenizer, which is left as it is.

        Raises InvalidInput where it is not a fast one: slow tokenizers give no offsets.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise InvalidInput(
                explain(
                    f"{type(tokenizer).__name__} is not a fast tokenizer, so it gives no character offsets",
                    accepted="a tokenizer with a tokenizer.json",
                    next_step="load it with AutoTokenizer and save it again with save_pretrained",
                )
            )
        backend = _own_copy(tokenizer.backend_tokenizer)
        added = backend.get_added_tokens_decoder().items()
        special = frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added if token.special}
        bos_id = tokenizer.bos_token_id
        return cls(
            backend=backend,
            digest=digest_of({"backend": backend.to_str(), "bos_id": bos_id, "special_ids": sorted(special)}),
            bos_id=bos_id,
            pad_id=tokenizer.pad_token_id,
            special_ids=special,
            vocabulary_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
            source=tokenizer,
        )

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer by itself begins every text with BOS."""
        return self.bos_id is not None and self.backend.encode("").ids[:1] == [self.bos_id]

    def chats(self, chat_field: str) -> Chats:
        """Return how objects with messages in a field become documents; raises InvalidInput without a template."""
        return Chats(chat_field, ChatTemplate(self.source))

    def vocabulary(self) -> list[str]:
        """Return the display text of every id from 0; ids without a token have ""."""
        description = json.loads(self.backend.to_str())
        return display_vocabulary(description, self.backend.get_vocab(with_added_tokens=True), self.special_ids)

    def encode(self, texts: Sequence[str]) -> EncodedTexts:
        """Return the tokens of texts without lone surrogates: nothing is added, a special token in a text is one."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        n_tokens = np.fromiter(map(len, encodings), np.int64, len(encodings))
        n_all = int(n_tokens.sum())
        offsets = np.fromiter(_flat_offsets(encodings), np.int32, 2 * n_all).reshape(n_all, 2)
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, n_all)
        n_bos = np.full(len(texts), int(self.bos_id is not None), dtype=np.int64)
        flags, role = np.zeros(n_all, np.int32), np.full(n_all, NO_ROLE, np.int32)
        return EncodedTexts(ids, offsets[:, 0], offsets[:, 1], n_tokens, n_bos, flags, role)


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> TokenizerHandle:
    """Return the tokenizer of a local model folder or of a hub model; no code that it brings along is run.

    Raises MissingInput where it is not there, InvalidInput where it has no fast tokenizer.
    """
    path = Path(source).expanduser()
    if not path.is_dir() and (path.exists() or not _HUB_NAME.fullmatch(str(source))):
        raise _missing(source, "no folder of this name")
    from transformers import AutoTokenizer

    name = str(path) if path.is_dir() else str(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except OSError as error:
        raise _missing(source, _first_line(error)) from error
    except Exception as error:  # the library raises bare Exception for a broken tokenizer.json
        raise InvalidInput(
            explain(
                f"{source} has no fast tokenizer that can be loaded ({_first_line(error)})",
                accepted="a folder or hub model with a tokenizer.json",
                next_step="save the tokenizer into it with save_pretrained",
            )
        ) from error
    return TokenizerHandle.from_transformers(tokenizer)


def _own_copy(backend: Tokenizer) -> Tokenizer:
    """Return a copy that neither truncates nor pads: both are left over from other calls and would change rows."""
    from tokenizers import Tokenizer

    try:
        copy = Tokenizer.from_str(backend.to_str())
    except Exception as error:  # parts written in Python cannot be serialised, and the library raises bare Exception
        raise InvalidInput(
            explain(
                f"The tokenizer cannot be serialised ({_first_line(error)})",
                accepted="a tokenizer that can be saved as tokenizer.json",
                next_step="replace its parts that are written in Python",
            )
        ) from error
    copy.no_truncation()
    copy.no_padding()
    return copy


def _flat_offsets(encodings: Sequence[Encoding]) -> chain[int]:
    return chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip() or type(error).__name__


def _missing(source: str | Path, reason: str) -> MissingInput:
    return MissingInput(
        explain(
            f"There is no tokenizer {str(source)!r} ({reason})",
            accepted="a local model folder, or a hub model owner/name",
            next_step="check the path, the name and the network",
        )
    )
