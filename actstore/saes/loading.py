"""From a place to a `SparseCoder`: Gemma Scope's `params.npz`, checked against its name before it is believed."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from actstore.errors import InvalidInput, MissingInput, explain
from actstore.recipe import SaeIdentity

from .arguments import ResolvedSae
from .coder import ARRAYS, SparseCoder, shape_faults, value_faults
from .hub import FetchedFile, fetch_file
from .names import width_of_label
from .npz import ArrayHeader, Unreadable, read_arrays, read_headers
from .places import FILE_NAME

__all__ = ["SaeSizes", "load_sae", "sae_sizes"]


@dataclass(frozen=True)
class SaeSizes:
    """Sizes of an SAE before it is loaded; `d_in` is None where only the name of a hub folder is known."""

    width: int
    d_in: int | None


def sae_sizes(resolved: ResolvedSae) -> SaeSizes:
    """Return an SAE's sizes without reading weights: from the file's headers, or from the name of a hub folder.

    Downloads only where the name does not say the width. Raises as `load_sae`.
    """
    if resolved.place.repository and resolved.name:
        return SaeSizes(width_of_label(resolved.name.width_label), None)
    with _opened(resolved, _fetch(resolved).path) as (_, _, headers):
        d_in, width = headers["w_enc"].shape
    return SaeSizes(width, d_in)


def load_sae(resolved: ResolvedSae) -> SparseCoder:
    """Read an SAE's file, fetching it where it is on the hub.

    Raises MissingInput where it is not there, InvalidInput, with all faults in one message, for a file that is not
    an npz of float32 or float16 arrays, whose arrays are missing, unknown, damaged or inconsistent, that claims more
    than it holds, or whose number of features is not the one in its name. Nothing in it is ever unpickled.
    """
    fetched = _fetch(resolved)
    with _opened(resolved, fetched.path) as (file, archive, headers):
        arrays = read_arrays(archive, headers)
        if faults := value_faults(arrays):
            raise Unreadable(faults)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    d_in, width = arrays["w_enc"].shape
    return SparseCoder(_identity(resolved, fetched, width, d_in, digest), **arrays)


def _fetch(resolved: ResolvedSae) -> FetchedFile:
    place = resolved.place
    if place.repository is None:
        return FetchedFile(Path(place.folder) / FILE_NAME, None)
    return fetch_file(place.repository, f"{place.inner_folder}/{FILE_NAME}")


def _identity(resolved: ResolvedSae, fetched: FetchedFile, width: int, d_in: int, digest: str) -> SaeIdentity:
    name, place = resolved.name, resolved.place
    return SaeIdentity(
        sae=resolved.sae,
        site=str(resolved.site),
        width=width,
        d_in=d_in,
        architecture="jumprelu",
        weights_digest=digest,
        release=place.repository or (name.release if name else None),
        sae_id=place.inner_folder if place.repository else name.inner_path if name else None,
        neuronpedia_id=name.neuronpedia_id if name else None,
        revision=fetched.revision,
        declared_l0=float(name.l0) if name else None,
    )


@contextmanager
def _opened(
    resolved: ResolvedSae, path: Path
) -> Iterator[tuple[io.BufferedReader, zipfile.ZipFile, Mapping[str, ArrayHeader]]]:
    """Open one file once, so that what is digested is what was read; translate its faults."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            yield file, archive, _checked_headers(resolved, archive, os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        raise MissingInput(explain(f"The file {path} is not there any more")) from error
    except zipfile.BadZipFile as error:
        raise _refused(resolved, [f"it is not an npz archive, or is cut short ({error})"]) from error
    except Unreadable as error:
        raise _refused(resolved, error.faults) from error


def _checked_headers(resolved: ResolvedSae, archive: zipfile.ZipFile, archive_bytes: int) -> dict[str, ArrayHeader]:
    found = read_headers(archive, archive_bytes)
    names = [name.lower() for name in found]  # W_enc and w_enc are both in use
    faults = [f"{name} is missing" for name in ARRAYS if name not in names]
    faults += [f"{name} is not part of the format" for name in found if name.lower() not in ARRAYS]
    faults += [f"{name} is there twice" for name in ARRAYS if names.count(name) > 1]
    if not faults:
        headers = {name.lower(): header for name, header in found.items()}
        faults = shape_faults({name: header.shape for name, header in headers.items()}) or _width_fault(
            resolved, headers
        )
    if faults:
        raise Unreadable(faults)
    return headers


def _width_fault(resolved: ResolvedSae, headers: Mapping[str, ArrayHeader]) -> list[str]:
    width = headers["w_enc"].shape[1]
    if resolved.name is None or width == (declared := width_of_label(resolved.name.width_label)):
        return []
    return [f"it has {width:,} features, and {declared:,} by its name width_{resolved.name.width_label}"]


def _refused(resolved: ResolvedSae, faults: list[str]) -> InvalidInput:
    return InvalidInput(
        explain(
            f"The SAE {resolved.place}/{FILE_NAME} cannot be used: {'; '.join(faults)}",
            accepted="an npz of float32 arrays W_enc (d_in, d_sae), W_dec (d_sae, d_in), b_enc, b_dec, threshold",
            next_step="fetch the file again, or choose another SAE",
        )
    )
