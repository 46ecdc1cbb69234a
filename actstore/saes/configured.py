"""The configuration of an SAE: a file beside the weights, or values in the weights that are no tensors."""

from __future__ import annotations

import json
import os
from typing import Any

from actstore.errors import InvalidInput, MissingInput, explain

from .config import Config, read_config
from .faults import Unreadable
from .pickled import read_pickled_values
from .places import Place

__all__ = ["configuration_of"]


def configuration_of(place: Place) -> Config:
    """Return what says how to read the weights of a place, empty where its layout says all.

    Opens a pickle where that is where it stands: the caller has refused it where it must not be opened.
    Raises MissingInput where it is not there, InvalidInput where it cannot be read.
    """
    if place.format.values:
        return Config(_values(place))
    if place.format.config is None:
        return Config({})
    return read_config(place.fetch(place.format.config).path)


def _values(place: Place) -> dict[str, Any]:
    path = place.fetch(place.weights).path
    try:
        with path.open("rb") as file:
            found = read_pickled_values(file, os.fstat(file.fileno()).st_size, place.format.values)
        json.dumps(found)  # or it holds what no configuration does
    except FileNotFoundError as error:
        raise MissingInput(explain(f"The file {path} is not there any more")) from error
    except Unreadable as error:
        raise _refused(place, str(error)) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise _refused(place, f"{', '.join(sorted(place.format.values))} are more than text and numbers") from error
    return found


def _refused(place: Place, fault: str) -> InvalidInput:
    return InvalidInput(
        explain(f"The SAE {place.file} cannot be used: {fault}", next_step="fetch it again, or choose another SAE")
    )
