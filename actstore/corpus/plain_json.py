"""Any value of a dataset as JSON that every reader accepts.

Datasets hold dates, bytes, arrays, NaN and broken text; metadata must never stop a run. What has one stable text
becomes that text; what has none becomes null, since a text such as an object's address would differ at each reading.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import math
import re
import uuid
from collections.abc import Mapping, Set
from pathlib import PurePath
from typing import Any

__all__ = ["SurrogateCount", "plain_json"]

_SURROGATE = re.compile("[\ud800-\udfff]")
_TEXT_TYPES = (datetime.timedelta, decimal.Decimal, uuid.UUID, PurePath)
# Integers beyond these are valid JSON that common readers refuse or round.
_INTEGER_RANGE = range(-(2**63), 2**64)


class SurrogateCount:
    """Replaces lone surrogates, which no UTF-8 file can hold, by U+FFFD and counts them."""

    def __init__(self) -> None:
        self.n_replaced = 0

    def clean(self, text: str) -> str:
        """Return `text` without surrogates, of the same length in code points."""
        cleaned, n_found = _SURROGATE.subn("\ufffd", text)
        self.n_replaced += n_found
        return cleaned


def plain_json(value: Any, surrogates: SurrogateCount) -> Any:
    """Return `value` as null, booleans, numbers, text, lists and objects with text keys.

    NaN, infinities, bytes that are not UTF-8 and objects without a stable text become null; dates become ISO 8601.
    Raises RecursionError for values nested too deeply.
    """
    if isinstance(value, Mapping):
        return {surrogates.clean(str(key)): plain_json(item, surrogates) for key, item in value.items()}
    if isinstance(value, (list, tuple, Set)):
        items = sorted(value, key=repr) if isinstance(value, Set) else value
        return [plain_json(item, surrogates) for item in items]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        plain = value.tolist()
        return plain_json(plain, surrogates) if type(plain) is not type(value) else None
    return _plain_scalar(value, surrogates)


def _plain_scalar(value: Any, surrogates: SurrogateCount) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return surrogates.clean(str(value))
    if isinstance(value, int):
        return int(value) if value in _INTEGER_RANGE else _long_integer_text(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (bytes, bytearray)):
        return _utf8_or_none(bytes(value))
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return surrogates.clean(str(value)) if isinstance(value, _TEXT_TYPES) else None


def _long_integer_text(value: int) -> str | None:
    try:
        return str(value)
    except ValueError:  # Python refuses to print integers of several thousand digits
        return None


def _utf8_or_none(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None
