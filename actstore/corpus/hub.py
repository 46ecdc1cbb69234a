"""Hugging Face datasets: from the hub, from `save_to_disk`, or loaded already. The one home of that library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actstore.errors import ActstoreError, InvalidInput, MissingInput, explain

from .document import Document, MakeDocument
from .optional import require

__all__ = ["is_loaded_dataset", "is_saved_dataset", "open_hub_dataset", "open_saved_dataset", "read_dataset"]

_SAVED_FILES = ("state.json", "dataset_dict.json")


def is_loaded_dataset(source: object) -> bool:
    """Return whether `source` is a dataset object, without importing the library."""
    datasets = sys.modules.get("datasets")  # an object of it exists only where it was imported
    if datasets is None:
        return False
    kinds = (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)
    return isinstance(source, kinds)


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in _SAVED_FILES)


def open_saved_dataset(folder: Path) -> Any:
    """Return the dataset that `save_to_disk` wrote, mapped from disk; raises InvalidInput where it is damaged."""
    datasets = require("datasets", f"Reading the saved dataset {folder}")
    with _translated(f"The saved dataset {folder}"):
        return datasets.load_from_disk(str(folder))


def open_hub_dataset(name: str, *, config: str | None, split: str | None, streaming: bool, revision: str | None) -> Any:
    """Return a dataset of the hub; code that a dataset brings along is never run.

    Raises MissingInput where it is not there or cannot be reached, InvalidInput for a wrong config or split.
    """
    datasets = require("datasets", f"Reading {name} from the hub")
    with _translated(f"The dataset {name}"):
        return datasets.load_dataset(name, name=config, split=split, streaming=streaming, revision=revision)


def read_dataset(dataset: Any, name: str, split: str | None, make: MakeDocument) -> Iterator[Document]:
    """Return the documents of a dataset or of one of its splits.

    Without `split` the only one is read, or `train`. Raises InvalidInput where that does not decide.
    """
    if isinstance(dataset, dict):
        return _documents(_chosen_split(dataset, name, split), name, make)
    return _documents(dataset, name, make)


def _chosen_split(splits: dict[str, Any], name: str, split: str | None) -> Any:
    wanted = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if wanted in splits:
        return splits[wanted]
    raise InvalidInput(
        explain(
            f"{name} has no split {wanted!r}",
            accepted=", ".join(map(str, splits)) or "none",
            next_step="name one of them (split)",
        )
    )


def _documents(dataset: Any, name: str, make: MakeDocument) -> Iterator[Document]:
    with _translated(name):
        for number, item in enumerate(_plain_values(dataset), start=1):
            yield make(item, f"{name}, document {number},")


def _plain_values(dataset: Any) -> Any:
    """Return the dataset without numpy's, torch's, … format: numpy's drops NULs at the end of a text.

    A transform that the user set is part of the dataset and stays.
    """
    has_transform = getattr(dataset, "format", {}).get("type") == "custom"
    return dataset if has_transform else dataset.with_format(None)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    datasets = require("datasets", "Reading a dataset")
    not_there = (datasets.exceptions.DatasetNotFoundError, ConnectionError, TimeoutError)
    try:
        yield
    except ActstoreError:
        raise
    except not_there as error:
        raise MissingInput(
            explain(
                f"{what} is not there or cannot be reached ({error})",
                accepted="a public dataset owner/name, or one that your login may read",
                next_step="check its name and the network, or give a local file",
            )
        ) from error
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InvalidInput(
            explain(f"{what} cannot be read ({error})", next_step="check the config, split and revision given")
        ) from error
