"""Where a store is: a local directory or an fsspec URL, read through one small interface. Home of fsspec."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import zarr
from fsspec.implementations.local import LocalFileSystem
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from actstore.errors import CorruptStore, MissingInput, explain
from actstore.sealed import partial_path, publish, translate_full_disk, unseal
from actstore.settings import cache_directory

__all__ = ["Location"]


@dataclass(frozen=True)
class Location:
    """A store's directory for reading; names are relative, with `/`."""

    url: str
    filesystem: Any
    root: str

    @classmethod
    def of(cls, path_or_url: str | Path) -> Location:
        """Return the location of a path or fsspec URL; nothing is read yet.

        Raises MissingInput where no installed filesystem understands the URL.
        """
        url = str(path_or_url)
        try:
            filesystem, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise MissingInput(
                explain(
                    f"The store {url!r} cannot be reached ({error})",
                    accepted="a local path, or a URL of a filesystem that fsspec knows (s3://, gs://, https://, memory://)",
                    next_step="check the URL, or install the filesystem's package, e.g. `pip install s3fs`",
                )
            ) from error
        return cls(url, filesystem, root.rstrip("/"))

    @property
    def local(self) -> Path | None:
        """The directory where the store is local, else None."""
        return Path(self.root) if isinstance(self.filesystem, LocalFileSystem) else None

    def exists(self, name: str = "") -> bool:
        """Return whether a file or directory is there."""
        return bool(self.filesystem.exists(self._full(name)))

    def size(self, name: str) -> int:
        """Return a file's size in bytes; raises FileNotFoundError where it is missing."""
        return int(self.filesystem.size(self._full(name)))

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raises FileNotFoundError where it is missing."""
        data: bytes = self.filesystem.cat_file(self._full(name))
        return data

    def read_sealed(self, name: str) -> dict[str, Any]:
        """Return the body of a sealed file; raises CorruptStore or FileNotFoundError."""
        return unseal(self.read(name), f"{self.url}/{name}")

    def names(self, directory: str) -> list[str]:
        """Return the names in a directory, sorted; none where it does not exist."""
        self.filesystem.invalidate_cache()
        try:
            found = self.filesystem.ls(self._full(directory), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)

    def fetch(self, name: str, sha256: str) -> Path:
        """Return a local file with this content: the file itself, or a copy in the cache, kept by digest.

        Raises CorruptStore where what was fetched is not what the digest says.
        """
        if self.local is not None:
            return self.local / name
        cached = cache_directory() / "files" / sha256[:2] / sha256 / Path(name).name
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            self._download(name, sha256, cached)
        return cached

    def _download(self, name: str, sha256: str, cached: Path) -> None:
        """Copy a file to the cache, never all of it in memory, and give it its name when its digest is right."""
        partial = partial_path(cached)
        with translate_full_disk(cached):
            try:
                self.filesystem.get_file(self._full(name), str(partial))
                with partial.open("rb+") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                    os.fsync(file.fileno())
                if found != sha256:
                    raise CorruptStore(
                        explain(
                            f"{self.url}/{name} is not what the store lists", next_step="run `actstore verify` there"
                        )
                    )
                publish(partial, cached)
            finally:
                partial.unlink(missing_ok=True)

    def zarr_array(self, name: str) -> zarr.Array[Any]:
        """Return the Zarr array below this store at `name`, read-only; raises what zarr raises."""
        store: Store
        if self.local is not None:
            store = LocalStore(self.local / name, read_only=True)
        else:
            store = FsspecStore.from_url(f"{self.url.rstrip('/')}/{name}", read_only=True)
        return zarr.open_array(store, mode="r")

    def _full(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root
