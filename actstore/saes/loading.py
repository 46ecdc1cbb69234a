"""From a place to a `SparseCoder`: weights, checked against their name and configuration before they are believed."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actstore.errors import InvalidInput, MissingInput, explain
from actstore.hub import FetchedFile
from actstore.recipe import SaeIdentity

from .arguments import ResolvedSae
from .coder import SparseCoder, infinite_faults, shape_faults, value_faults
from .declaration import Arrays, Declaration
from .faults import Unreadable, spelled
from .layers import LayerDecoders, layer_faults
from .multi_layer import read_layer_name
from .names import width_of_label
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
        layers = _layers(resolved, fetched.path, weights)
        if faults := value_faults(arrays) + (layer_faults(file, layers.header, layers.position) if layers else []):
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
        layers=layers,
    )


def _fetch(resolved: ResolvedSae) -> FetchedFile:
    return resolved.place.fetch(resolved.place.weights)


def _layers(resolved: ResolvedSae, path: Path, weights: Weights[Any]) -> LayerDecoders | None:
    """Return where the decoders of one layer of a coder of several lie."""
    position = resolved.declaration.position
    if position is None:
        return None
    header = next(header for name, header in weights.headers.items() if name.lower() == "w_dec")
    return LayerDecoders(resolved.place.folder, position, path, header)


def _identity(resolved: ResolvedSae, fetched: FetchedFile, width: int, d_in: int, digest: str) -> SaeIdentity:
    name, place, listed = resolved.name or read_layer_name(str(resolved.place)), resolved.place, resolved.listed
    return SaeIdentity(
        sae=resolved.sae,
        site=str(resolved.site),
        width=width,
        d_in=d_in,
        write_site=None if resolved.write_site is None else str(resolved.write_site),
        architecture=resolved.declaration.architecture,
        weights_digest=digest,
        release=listed.release if listed else place.repository or (name.release if name else None),
        sae_id=listed.sae_id if listed else _sae_id(resolved),
        neuronpedia_id=resolved.neuronpedia_id,
        revision=fetched.revision,
        declared_l0=float(resolved.name.l0) if resolved.name else resolved.declaration.declared_l0,
    )


def _sae_id(resolved: ResolvedSae) -> str | None:
    if resolved.place.repository:
        return resolved.place.inner_path or None
    name = resolved.name or read_layer_name(str(resolved.place))
    return name.inner_path if name else None


@contextmanager
def _opened(resolved: ResolvedSae, path: Path) -> Iterator[tuple[io.BufferedReader, Weights[Any]]]:
    """Open one file once, so that what is digested is what was read; translate its faults."""
    try:
        with path.open("rb") as file, open_weights(file, path.suffix, resolved.place.format.values) as weights:
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
    if faults := _name_faults(declaration, weights.headers):
        raise Unreadable(faults)
    shapes = {ours: header.shape for ours, header in _wanted(declaration, weights).items()}
    single = {declaration.tensors[ours]: shapes.pop(ours) for ours in declaration.scalars}
    faults = [f"{name} is {shape}, not one number" for name, shape in single.items() if math.prod(shape) != 1]
    if faults := faults + _axis_faults(declaration, shapes["w_dec"]):
        raise Unreadable(faults)
    if declaration.position is not None:
        shapes["w_dec"] = shapes["w_dec"][::2]
    shapes |= {ours: shapes[ours][::-1] for ours in declaration.turned}
    transcodes = resolved.write_site is not None
    if faults := shape_faults(shapes, transcodes=transcodes) or _width_faults(resolved, shapes):
        raise Unreadable(faults)
    return shapes


def _name_faults(declaration: Declaration, found: Collection[str]) -> list[str]:
    """Return which tensors are missing, unknown or there twice; W_enc and w_enc are both in use."""
    names, known = Counter(name.lower() for name in found), declaration.names
    faults = [f"{name} is missing" for name in declaration.tensors.values() if name.lower() not in names]
    allowed = {*known, *declaration.ignored}
    faults += [f"{name} is not part of the format" for name in found if name.lower() not in allowed]
    return faults + [f"{name} is there twice" for name in known if names[name] > 1]


def _axis_faults(declaration: Declaration, w_dec: tuple[int, ...]) -> list[str]:
    """Return what is wrong with the axis of layers of a decoder that has one."""
    position, n_layers = declaration.position, declaration.n_layers
    if position is None:
        return []
    if len(w_dec) != 3:
        return [f"w_dec is {w_dec}, where (d_sae, layer, d_out) is expected"]
    if position >= w_dec[1] or n_layers not in (None, w_dec[1]):
        return [f"w_dec has {w_dec[1]} layers, and it is number {position} of {n_layers or 'them'} by its path"]
    return []


def _arrays(resolved: ResolvedSae, weights: Weights[Any]) -> Arrays:
    declaration = resolved.declaration
    headers = _wanted(declaration, weights)
    if declaration.position is not None:
        headers["w_dec"] = headers["w_dec"].at(declaration.position)
    read = weights.read(headers)
    return read | {ours: np.ascontiguousarray(read[ours].T) for ours in declaration.turned}


def _wanted(declaration: Declaration, weights: Weights[Any]) -> dict[str, Any]:
    """Return the headers of our arrays, by our names."""
    known = declaration.names
    return {known[name.lower()]: header for name, header in weights.headers.items() if name.lower() in known}


def _declared_width(resolved: ResolvedSae) -> int | None:
    return width_of_label(resolved.name.width_label) if resolved.name else resolved.declaration.d_sae


def _width_faults(resolved: ResolvedSae, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    said = (
        f"its name width_{resolved.name.width_label}" if resolved.name else f"its {resolved.place.format.described_by}"
    )
    d_in, width = shapes["w_enc"]
    found = (
        (f"it has {width:,} features", width, _declared_width(resolved)),
        (f"it reads {d_in:,} numbers", d_in, resolved.declaration.d_in),
        (f"it writes {shapes['w_dec'][1]:,} numbers", shapes["w_dec"][1], resolved.declaration.d_out),
    )
    return [f"{what}, and {asked:,} by {said}" for what, size, asked in found if asked not in (None, size)]


def _refused(resolved: ResolvedSae, faults: list[str]) -> InvalidInput:
    return InvalidInput(
        explain(
            f"The SAE {resolved.place.file} cannot be used: {spelled(faults)}",
            accepted=resolved.declaration.accepted,
            next_step="fetch the file again, or choose another SAE",
        )
    )
