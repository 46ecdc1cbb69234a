"""Which releases of transformers the places of the sites are known for."""

from __future__ import annotations

import re
from importlib.metadata import version

from actstore.errors import MissingDependency, explain

__all__ = ["OLDEST_TRANSFORMERS", "check_transformers"]

OLDEST_TRANSFORMERS = "5.4"
"""The first release in which the layers of all described architectures return a plain tensor, and Gemma 2 scales its
embeddings inside the embedding's module. Nothing was tried with an older one."""


def check_transformers() -> None:
    """Raise MissingDependency where the transformers that is installed is older than the sites were proved with."""
    found = version("transformers")
    if _numbers(found) < _numbers(OLDEST_TRANSFORMERS):
        raise MissingDependency(
            explain(
                f"transformers {found} is too old: its modules take and return other tensors than those "
                "that the sites were proved with",
                accepted=f"transformers {OLDEST_TRANSFORMERS} or newer",
                next_step=f"pip install --upgrade 'transformers>={OLDEST_TRANSFORMERS}'",
            )
        )


def _numbers(release: str) -> tuple[int, ...]:
    """Return the release's two numbers; what marks a development version behind them is left out."""
    return tuple(map(int, re.findall(r"\d+", release)[:2]))
