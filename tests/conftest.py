"""Stores that are made once a session; tests read them and change only copies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from asking_support import SmallStore, build_small_store

import actstore
from actstore.api import Store


@pytest.fixture(scope="session", autouse=True)
def _cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kit pieces are shared through a cache: not through the user's."""
    if "ACTSTORE_CACHE" in os.environ:
        yield
        return
    os.environ["ACTSTORE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    del os.environ["ACTSTORE_CACHE"]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    """The embedded model over forty documents; built once."""
    return build_small_store(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def opened(small: SmallStore) -> Iterator[Store]:
    """The small store, opened once."""
    with actstore.open(small.path) as store:
        yield store


@pytest.fixture
def copied(small: SmallStore, tmp_path: Path) -> Callable[[], Path]:
    """Make a copy of the small store that a test may change."""

    def copy() -> Path:
        return Path(shutil.copytree(small.path, tmp_path / "copy.act"))

    return copy
