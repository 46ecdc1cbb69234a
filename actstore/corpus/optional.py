"""Libraries that only some datasets need."""

from __future__ import annotations

import importlib
from types import ModuleType

from actstore.errors import MissingDependency, explain

__all__ = ["require"]


def require(module: str, purpose: str) -> ModuleType:
    """Return an optional library; raises MissingDependency with the install line where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise MissingDependency(
            explain(f"{purpose} needs the library {library!r}", next_step="pip install 'actstore[datasets]'")
        ) from error
