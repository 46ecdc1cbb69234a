"""From a place to a `SparseCoder`: weights, checked against their name and configuration before they are believed."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actstore.errors import InvalidInput, MissingInput, explain
from actstore.recipe import SaeIdentity

from .arguments import ResolvedSae
from .coder import SparseCoder, infinite_faults, shape_faults, value_faults
from .declaration import Arrays
from .hub import FetchedFile, fetch_file
from .names import width_of_label
from .npz import Unreadable
from .weights import Weights, open_weights

__all__ = ["SaeSizes", "load_sae", "sae_sizes"]


@dataclass(frozen=True)
class SaeSizes:
    """Sizes of an SAE before it is loaded; `d_in` is None where only the name of a hub folder is known."""

    width: int
    d_in: int | None


def sae_sizes(resolved: ResolvedSae) -> SaeSizes:
    """Return an SAE's sizes without reading weights: from the file's headers, or what is known of a file on the hub.

    Downloads weights only where neither name nor configuration says the width. Raises as `load_sae`.
    """
    if resolved.place.repository and (width := _declared_width(resolved)):
        return SaeSizes(width, resolved.declaration.d_in)
    with _opened(resolved, _fetch(resolved).path) as (_, weights):
        d_in, width = _checked_shapes(resolved, weights)["w_enc"]
    return SaeSizes(width, d_in)


def load_sae(resolved: ResolvedSae) -> SparseCoder:
    """Read an SAE's file, fetching it where it is on the hub.

    Raises MissingInput where it is not there, InvalidInput, with all faults in one message, for a file whose arrays
    are of another type, missing, unknown, damaged or inconsistent, that claims more than it holds, or that contradicts
    its name or its configuration. Nothing in it is ever unpickled.
    """
    fetched, declaration = _fetch(resolved), resolved.declaration
    with _opened(resolved, fetched.path) as (file, weights):
        _checked_shapes(resolved, weights)
        arrays = _arrays(resolved, weights)
        if faults := value_faults(arrays):
            raise Unreadable(faults)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        with np.errstate(all="ignore"):  # what becomes infinite is named below
            arrays = declaration.fold(arrays)
        if faults := infinite_faults(arrays):
            raise Unreadable(faults)
    d_in, width = arrays["w_enc"].shape
    return SparseCoder(
        _identity(resolved, fetched, width, d_in, digest),
        **arrays,
        k=declaration.k,
        subtracts_b_dec=declaration.subtracts_b_dec,
        normalisation=declaration.normalisation,
        unit_decoder=declaration.unit_decoder,
    )


def _fetch(resolved: ResolvedSae) -> FetchedFile:
    place = resolved.place
    if place.repository is None:
        return FetchedFile(Path(place.folder) / place.format.weights, None)
    return fetch_file(place.repository, place.path_of(place.format.weights))


def _identity(resolved: ResolvedSae, fetched: FetchedFile, width: int, d_in: int, digest: str) -> SaeIdentity:
    name, place = resolved.name, resolved.place
    return SaeIdentity(
        sae=resolved.sae,
        site=str(resolved.site),
        width=width,
        d_in=d_in,
        architecture=resolved.declaration.architecture,
        weights_digest=digest,
        release=place.repository or (name.release if name else None),
        sae_id=place.inner_folder or None if place.repository else name.inner_path if name else None,
        neuronpedia_id=name.neuronpedia_id if name else None,
        revision=fetched.revision,
        declared_l0=float(name.l0) if name else resolved.declaration.declared_l0,
    )


@contextmanager
def _opened(resolved: ResolvedSae, path: Path) -> Iterator[tuple[io.BufferedReader, Weights[Any]]]:
    """Open one file once, so that what is digested is what was read; translate its faults."""
    try:
        with path.open("rb") as file, open_weights(file, path.suffix) as weights:
            yield file, weights
    except FileNotFoundError as error:
        raise MissingInput(explain(f"The file {path} is not there any more")) from error
    except zipfile.BadZipFile as error:
        raise _refused(resolved, [f"it is not an npz archive, or is cut short ({error})"]) from error
    except Unreadable as error:
        raise _refused(resolved, error.faults) from error


def _checked_shapes(resolved: ResolvedSae, weights: Weights[Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of our arrays, from headers alone; raises Unreadable where they contradict anything."""
    declaration = resolved.declaration
    known = declaration.names
    names = [name.lower() for name in weights.headers]  # W_enc and w_enc are both in use
    faults = [f"{name} is missing" for name in declaration.tensors.values() if name not in names]
    faults += [f"{name} is not part of the format" for name in weights.headers if name.lower() not in known]
    faults += [f"{name} is there twice" for name in known if names.count(name) > 1]
    if not faults:
        shapes = {known[name.lower()]: header.shape for name, header in weights.headers.items()}
        shapes |= {ours: shapes[ours][::-1] for ours in declaration.turned}
        vectors = {ours: shape for ours, shape in shapes.items() if ours not in declaration.scalars}
        faults = shape_faults(vectors) or _width_faults(resolved, shapes)
    if faults:
        raise Unreadable(faults)
    return shapes


def _arrays(resolved: ResolvedSae, weights: Weights[Any]) -> Arrays:
    declaration, known = resolved.declaration, resolved.declaration.names
    read = weights.read({known[name.lower()]: header for name, header in weights.headers.items()})
    return read | {ours: np.ascontiguousarray(read[ours].T) for ours in declaration.turned}


def _declared_width(resolved: ResolvedSae) -> int | None:
    return width_of_label(resolved.name.width_label) if resolved.name else resolved.declaration.d_sae


def _width_faults(resolved: ResolvedSae, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    d_in, width = shapes["w_enc"]
    said = f"its name width_{resolved.name.width_label}" if resolved.name else f"its {resolved.place.format.config}"
    declared, declared_d_in = _declared_width(resolved), resolved.declaration.d_in
    faults = [] if declared in (None, width) else [f"it has {width:,} features, and {declared:,} by {said}"]
    return (
        faults
        if declared_d_in in (None, d_in)
        else [*faults, f"it reads {d_in:,} numbers, and {declared_d_in:,} by {said}"]
    )


def _refused(resolved: ResolvedSae, faults: list[str]) -> InvalidInput:
    return InvalidInput(
        explain(
            f"The SAE {resolved.place}/{resolved.place.format.weights} cannot be used: {'; '.join(faults)}",
            accepted=resolved.declaration.accepted,
            next_step="fetch the file again, or choose another SAE",
        )
    )
