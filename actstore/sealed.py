"""Canonical JSON, digests, and files that are durable or absent (docs/format.md §2).

A *sealed* document is canonical JSON with its own digest inside: a reader recomputes the digest, and since the
bytes of a canonical document are determined by its content, one changed byte anywhere is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import CorruptStore, NoSpace, explain

__all__ = [
    "canonical_json",
    "digest_of",
    "fsync_directory",
    "partial_path",
    "publish",
    "read_sealed",
    "seal",
    "sha256_hex",
    "sha256_of_file",
    "translate_full_disk",
    "unseal",
    "write_durably",
    "write_sealed",
]

PARTIAL_SUFFIX = ".partial"
NO_SPACE_ERRNOS = frozenset({27, 28, 122})  # EFBIG, ENOSPC, EDQUOT


def canonical_json(value: object) -> bytes:
    """Return the one UTF-8 spelling of a JSON value: sorted keys, no spaces, no NaN.

    Raises ValueError for NaN and infinities, TypeError for what JSON cannot say.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256_hex(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file of any size, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: object) -> str:
    """Return the SHA-256 of a JSON value's canonical spelling, as 64 hexadecimal digits."""
    return sha256_hex(canonical_json(value))


def seal(body: Mapping[str, Any]) -> bytes:
    """Return `body` as canonical JSON with its digest added under `digest`, ending in a newline."""
    spelled = canonical_json(body)
    # Where the digest stands follows from the keys before it: what may be hundreds of megabytes is spelled out once.
    before = canonical_json({key: value for key, value in body.items() if key < "digest"})[1:-1]
    after = spelled[1 + len(before) : -1].removeprefix(b"," if before else b"")
    digest = f'"digest":"{sha256_hex(spelled)}"'.encode()
    return b"{" + b",".join(filter(None, (before, digest, after))) + b"}\n"


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """Return the body of a sealed document without its digest.

    Raises CorruptStore where a byte differs from what was sealed; `name` is how the message calls the file.
    """
    try:
        body = json.loads(data)
        digest = body.pop("digest")
        intact = seal(body) == data
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        intact, digest = False, None
    if not intact:
        raise CorruptStore(
            explain(
                f"{name} is not what was written (its digest does not match)",
                next_step="run `actstore verify` on the store to see everything that is damaged",
            )
        )
    assert isinstance(digest, str)
    return dict(body)


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the body of the sealed file at `path`.

    Raises CorruptStore where it was changed, FileNotFoundError where it is missing.
    """
    return unseal(path.read_bytes(), str(path))


def write_sealed(path: Path, body: Mapping[str, Any]) -> str:
    """Write `body` sealed and durably, replacing what was at `path`; return the SHA-256 of the file."""
    data = seal(body)
    write_durably(path, data)
    return sha256_hex(data)


def partial_path(path: Path) -> Path:
    """Return a fresh name beside `path` for content that is not finished; a sweep removes those left behind."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{PARTIAL_SUFFIX}")


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that after a crash or power loss it is whole, or what was there before.

    Raises NoSpace where the disk is full; nothing is left behind then.
    """
    partial = partial_path(path)
    with translate_full_disk(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def publish(partial: Path, path: Path) -> None:
    """Give a finished, fsynced file its name, durably and at once."""
    partial.replace(path)
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def translate_full_disk(path: Path) -> Iterator[None]:
    """Turn the system's "no space" into a `NoSpace` that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE_ERRNOS:
            raise
        raise NoSpace(
            explain(
                f"The disk is full: {path} could not be written ({error.strerror})",
                next_step="free space and run the same command again; every finished shard is kept",
            )
        ) from error
