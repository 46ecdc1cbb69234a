"""Token rows of windows: the fields of `corpus/tokens` (docs/format.md §3), whole batches at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from actstore.blocks import FLAG_REPEAT, FLAG_SPECIAL, TOKEN_FIELDS

from .tokenizer import NO_ROLE, EncodedTexts, TokenizerHandle
from .window import Cuts

__all__ = ["sequence_rows", "token_rows"]

NO_TOKEN = -1  # stands where no row has it: without a BOS every row is text


def sequence_rows(first_rows: npt.NDArray[np.int64], n_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the rows of consecutive sequences, int64 (token)."""
    return np.repeat(first_rows, n_tokens) + _positions(n_tokens)


def token_rows(encoded: EncodedTexts, cuts: Cuts, tokenizer: TokenizerHandle, first_seq: int) -> npt.NDArray[np.int32]:
    """Return the rows of all windows, int32 (row, field) in order of `TOKEN_FIELDS`.

    A window's BOS has no text: both of its offsets are the first text token's start.
    """
    n_bos = encoded.n_bos[cuts.document]
    n_rows_of_window = cuts.n_text + n_bos
    window = np.repeat(np.arange(len(n_rows_of_window)), n_rows_of_window)
    pos = _positions(n_rows_of_window)
    is_text = pos >= n_bos[window]
    first_token = (np.cumsum(encoded.n_tokens) - encoded.n_tokens)[cuts.document] + cuts.start
    token = first_token[window] + np.maximum(pos - n_bos[window], 0)
    char_start = encoded.char_start[token]
    bos_id = NO_TOKEN if tokenizer.bos_id is None else tokenizer.bos_id
    token_id = np.where(is_text, encoded.ids[token], bos_id)
    is_repeat = is_text & (pos - n_bos[window] < cuts.n_repeat[window])
    known_flags = np.where(is_text, encoded.flags[token], 0)
    columns = {
        "token_id": token_id,
        "seq": window + first_seq,
        "pos": pos,
        "char_start": char_start,
        "char_end": np.where(is_text, encoded.char_end[token], char_start),
        "flags": FLAG_SPECIAL * _special_table(tokenizer)[token_id] + FLAG_REPEAT * is_repeat + known_flags,
        "role": np.where(is_text, encoded.role[token], NO_ROLE),
    }
    return np.stack([columns[name].astype(np.int32) for name in TOKEN_FIELDS], axis=1)


def _positions(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return 0, 1, … for each of `lengths`, one after the other."""
    firsts = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum()), dtype=np.int64) - np.repeat(firsts, lengths)


def _special_table(tokenizer: TokenizerHandle) -> npt.NDArray[np.bool_]:
    table = np.zeros(tokenizer.vocabulary_size, dtype=bool)
    table[sorted(tokenizer.special_ids)] = True
    return table
