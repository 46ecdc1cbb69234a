"""Hugging Face datasets: objects, streams, saved folders, and what the hub would answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from actstore.corpus import Document, read_documents
from actstore.errors import ActstoreError, InvalidInput, MissingInput

ROWS = [{"text": "one", "n": 1}, {"text": "two\0", "n": 2}]
EXPECTED = [Document("one", {"n": 1}), Document("two\0", {"n": 2})]


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    datasets.disable_progress_bars()


def table() -> datasets.Dataset:
    return datasets.Dataset.from_list(ROWS)


def splits(*names: str) -> datasets.DatasetDict:
    return datasets.DatasetDict({name: table().select([i]) for i, name in enumerate(names)})


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(table, id="dataset"),
        pytest.param(lambda: table().to_iterable_dataset(), id="iterable_dataset"),
        pytest.param(lambda: datasets.IterableDataset.from_generator(lambda: iter(ROWS)), id="generator"),
        pytest.param(lambda: datasets.DatasetDict({"only": table()}), id="one_split"),
        pytest.param(lambda: table().with_format("numpy"), id="numpy_format"),
        pytest.param(lambda: table().to_iterable_dataset().with_format("numpy"), id="iterable_in_numpy_format"),
    ],
)
def test_a_loaded_dataset_is_read(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    assert list(read_documents(make())) == EXPECTED


def test_a_transform_of_the_users_is_applied() -> None:
    shouting = table().with_transform(lambda rows: {"text": [text.upper() for text in rows["text"]]})
    assert list(read_documents(shouting)) == [Document("ONE"), Document("TWO\0")]


def test_a_dataset_saved_to_disk_is_read(tmp_path: Path) -> None:
    table().save_to_disk(str(tmp_path / "saved"))
    assert list(read_documents(tmp_path / "saved")) == EXPECTED


def test_a_split_is_named_or_train_or_the_only_one(tmp_path: Path) -> None:
    splits("train", "test").save_to_disk(str(tmp_path / "saved"))
    assert list(read_documents(tmp_path / "saved")) == EXPECTED[:1]
    assert list(read_documents(tmp_path / "saved", split="test")) == EXPECTED[1:]
    assert list(read_documents(splits("other"))) == EXPECTED[:1]


def test_a_split_that_does_not_decide_lists_those_there_are() -> None:
    with pytest.raises(InvalidInput, match=r"no split 'train'.*a, b.*name one of them"):
        read_documents(splits("a", "b"))


def test_a_split_of_a_dataset_without_splits_is_refused(tmp_path: Path) -> None:
    table().save_to_disk(str(tmp_path / "saved"))
    for source in (table(), tmp_path / "saved"):
        with pytest.raises(InvalidInput, match="split='test'"):
            read_documents(source, split="test")


def test_a_wrong_field_names_the_document_and_its_fields() -> None:
    with pytest.raises(InvalidInput, match=r"document 1, has no field 'body'; its fields are text, n"):
        read_documents(table(), text_field="body")


def test_a_hub_name_is_loaded_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(path: str, **options: Any) -> datasets.IterableDataset:
        asked.update(options, path=path)
        return table().to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_documents("owner/name.v1", config="en", split="train", revision="abc")
    assert list(found) == EXPECTED
    assert asked == {"path": "owner/name.v1", "name": "en", "split": "train", "streaming": True, "revision": "abc"}


@pytest.mark.parametrize(
    ("raised", "expected", "parts"),
    [
        pytest.param(
            datasets.exceptions.DatasetNotFoundError("gone"),
            MissingInput,
            ["owner/name", "gone", "local file"],
            id="gone",
        ),
        pytest.param(ConnectionError("no network"), MissingInput, ["owner/name", "no network"], id="no_network"),
        pytest.param(ValueError("Config name is missing"), InvalidInput, ["Config name", "config"], id="no_config"),
    ],
)
def test_what_the_hub_refuses_is_an_error_with_the_next_step(
    raised: Exception, expected: type[ActstoreError], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, **options: Any) -> Any:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(expected) as caught:
        read_documents("owner/name")
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_stream_that_breaks_in_the_middle_is_an_error_of_ours() -> None:
    def rows() -> Any:
        yield ROWS[0]
        raise ConnectionError("cut")

    found = read_documents(datasets.IterableDataset.from_generator(rows))
    assert next(found) == EXPECTED[0]
    with pytest.raises(ActstoreError, match="cut"):
        next(found)
