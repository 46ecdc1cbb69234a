"""Every setting that comes from the environment: name, default, help. Nothing else reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SETTINGS", "Setting", "cache_directory"]


@dataclass(frozen=True)
class Setting:
    """One environment variable."""

    name: str
    default: str
    help: str

    def value(self) -> str:
        """Return what the environment says, or the default."""
        return os.environ.get(self.name) or self.default


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "ACTSTORE_CACHE",
            "~/.cache/actstore",
            "where files of remote stores are kept, by digest, and through which local stores share kit pieces",
        ),
    )
}


def cache_directory() -> Path:
    """Return the local cache's directory; it need not exist yet."""
    return Path(SETTINGS["ACTSTORE_CACHE"].value()).expanduser()
