"""Values as one line of text: what tables, cells and labels have in common."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["MARKED", "cell_text", "one_line"]

MARKED = re.compile("«([^«»]*)»")  # the token of a snippet


def one_line(text: str) -> str:
    """Return a text in which line breaks and control characters are shown, not obeyed."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(one if one.isprintable() else "�" for one in shown)


def cell_text(value: Any) -> str:
    """Return a value of a table as one line; numbers are rounded, lists cut."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.4e}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(" ".join(cell_text(one) for one in item.values()) for item in value[:8])
    if isinstance(value, list):
        return f"[{', '.join(cell_text(one) for one in value[:6])}{', …' if len(value) > 6 else ''}]"
    return one_line(str(value))
