"""Documents from files, standard input and Python values; what is wrong is named with file and line."""

from __future__ import annotations

import datetime
import decimal
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.corpus import Document, read_documents
from actstore.errors import InvalidInput, MissingDependency, MissingInput, UnsupportedFormat
from actstore.sealed import canonical_json

BOM = b"\xef\xbb\xbf"


def texts(source: Any, **options: Any) -> list[str]:
    return [document.text for document in read_documents(source, **options)]


def test_json_lines_give_text_and_metadata_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(BOM + b'{"text": "one", "source": "x", "n": [1, null]}\r\n\n   \n{"n": NaN, "text": "two\\u0000"}')
    assert list(read_documents(path)) == [
        Document("one", {"source": "x", "n": [1, None]}),
        Document("two\0", {"n": None}),
    ]


def test_the_text_may_be_in_another_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "one", "text": 3}\n')
    assert list(read_documents(str(path), text_field="content")) == [Document("one", {"text": 3})]


def test_a_text_file_is_one_document_with_its_line_ends_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.TXT"
    path.write_bytes(BOM + b"one\r\ntwo\n\0")
    assert list(read_documents(path)) == [Document("one\r\ntwo\n\0")]


def test_lone_surrogates_are_replaced_and_counted_in_text_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b\\udfff \\ud83d\\ude00", "k\\udc00": "\\udc01"}\n')
    [document] = read_documents(path)
    assert document == Document("a\ufffdb\ufffd 😀", {"k\ufffd": "\ufffd"}, n_replaced=4)
    assert len(canonical_json(dict(document.metadata))) > 0


def test_a_folder_is_read_in_order_of_its_relative_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "one.txt").write_text("b/one")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "own", "file": "mine"}\n')
    (tmp_path / "notes.md").write_text("left out")
    (tmp_path / ".hidden" / "x.txt").write_text("left out")
    assert list(read_documents(tmp_path)) == [
        Document("a", {"file": "a.jsonl"}),
        Document("own", {"file": "mine"}),
        Document("b/one", {"file": "b/one.txt"}),
    ]


def write_parquet(path: Path, columns: dict[str, pa.Array]) -> Path:
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def test_parquet_rows_are_documents_with_the_other_columns_as_metadata(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 5, 17, 12, 30)
    path = write_parquet(
        tmp_path / "a.parquet",
        {"text": pa.array(["one", "two\0"]), "day": pa.array([day, None]), "tags": pa.array([["x"], []])},
    )
    assert list(read_documents(path)) == [
        Document("one", {"day": "2024-05-17T12:30:00", "tags": ["x"]}),
        Document("two\0", {"day": None, "tags": []}),
    ]


def test_parquet_values_that_python_cannot_hold_become_text_or_null(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet",
        {
            "text": pa.array(["one"]),
            "nanoseconds": pa.array([1], pa.timestamp("ns")),
            "far": pa.array([2**30], pa.date32()),
            "bytes": pa.array([b"\xff"]),
            "number": pa.array([float("nan")]),
            "exact": pa.array([decimal.Decimal("1.50")]),
        },
    )
    [document] = read_documents(path)
    assert str(document.metadata["nanoseconds"]).endswith("00:00:00.000000001")
    rest = {name: value for name, value in document.metadata.items() if name not in ("nanoseconds", "far")}
    assert rest == {"bytes": None, "number": None, "exact": "1.50"}
    canonical_json(dict(document.metadata))


def test_more_parquet_rows_than_one_batch_keep_their_order(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": pa.array([str(i) for i in range(1000)])})
    assert texts(path) == [str(i) for i in range(1000)]


def feed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"], id="json_lines"),
        pytest.param(BOM + b'\n \n  {"text": "a"}', ["a"], id="json_lines_after_mark_and_blank_lines"),
        pytest.param(b"one\ntwo {\n", ["one\ntwo {\n"], id="plain_text"),
        pytest.param(b"\n\nindented", ["\n\nindented"], id="plain_text_after_blank_lines"),
        pytest.param(b'["a"]\n', ['["a"]\n'], id="a_json_list_is_plain_text"),
    ],
)
def test_standard_input_is_json_lines_or_one_text(
    data: bytes, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, data)
    assert texts("-") == expected


def test_python_values_are_read_lazily_and_made_clean() -> None:
    def endless() -> Any:
        yield from ["a", {"text": "b\ud800", "n": np.int64(3)}, Document("c", {"x": float("inf")}, n_replaced=1)]
        raise AssertionError("read too far")

    documents = read_documents(endless())
    assert [next(documents) for _ in range(3)] == [
        Document("a"),
        Document("b\ufffd", {"n": 3}, n_replaced=1),
        Document("c", {"x": None}, n_replaced=1),
    ]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.binary(max_size=4)
    | st.dates()
    | st.datetimes()
    | st.times()
    | st.timedeltas()
    | st.decimals()
    | st.uuids()
    | st.just(object()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_any_metadata_becomes_json_that_is_the_same_at_each_reading(value: Any) -> None:
    first, second = (next(read_documents([{"text": "a", "value": value}])) for _ in range(2))
    spelled = canonical_json(dict(first.metadata))
    assert json.loads(spelled) == first.metadata == second.metadata


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(2**64 - 1, 2**64 - 1, id="largest_integer"),
        pytest.param(2**64, str(2**64), id="integer_too_long_for_readers"),
        pytest.param(10**5000, None, id="integer_that_python_does_not_print"),
        pytest.param(b"abc", "abc", id="bytes_that_are_text"),
        pytest.param(object(), None, id="object_without_stable_text"),
        pytest.param(np.array([1.5, np.nan]), [1.5, None], id="array"),
        pytest.param(np.longdouble(1), None, id="scalar_without_python_equal"),
        pytest.param({8, 1}, [1, 8], id="set_in_a_fixed_order"),
        pytest.param({1: {"a": (1,)}}, {"1": {"a": [1]}}, id="keys_become_text"),
    ],
)
def test_metadata_values_have_one_json_form(value: Any, expected: Any) -> None:
    [document] = read_documents([{"text": "a", "value": value}])
    assert document.metadata["value"] == expected


BAD_FILES: list[Any] = [
    pytest.param("a.jsonl", b'{"text": "a"}\n\n{"text": \n', ["line 3", "not JSON", "correct"], id="bad_json"),
    pytest.param("a.jsonl", b'"text"\n', ["line 1", "not an object", "one JSON object a line"], id="not_an_object"),
    pytest.param("a.jsonl", b'{"body": "a", "n": 1}\n', ["line 1", "'text'", "body, n", "text_field"], id="no_field"),
    pytest.param("a.jsonl", b'{"text": null}\n', ["line 1", "null", "text_field"], id="null_text"),
    pytest.param("a.jsonl", b'{"text": ["a"]}\n', ["line 1", "type list", "text_field"], id="text_is_a_list"),
    pytest.param("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', ["line 2", "0xFF", "UTF-8", "iconv"], id="not_utf8"),
    pytest.param("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", ["line 1", "number too long"], id="endless_number"),
    pytest.param("a.jsonl", b'{"text":"a","x":' + b"[" * 10**5, ["line 1", "nested too deeply"], id="deep_json"),
    pytest.param("a.jsonl", b"\n\n", ["holds no document", "at least one"], id="no_document"),
    pytest.param("a.txt", b"one\ntwo\n\xe2\x82", ["line 3", "0xE2", "iconv"], id="text_not_utf8"),
    pytest.param("a.parquet", b"PAR1 no", ["cannot be read as Parquet", "again"], id="broken_parquet"),
]


@pytest.mark.parametrize(("name", "data", "parts"), BAD_FILES)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    name: str, data: bytes, parts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        list(read_documents(path))
    assert all(part in str(caught.value) for part in [str(path), *parts]), str(caught.value)


def test_parquet_without_text_names_the_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": pa.array(["a"] * 700 + [None])})
    with pytest.raises(InvalidInput, match="row 701, has null in the field 'text'"):
        list(read_documents(path))


@pytest.mark.parametrize("name", ["/no/such.jsonl", "data/train.jsonl", "no_such_name", "~/no/such/folder"])
def test_a_source_that_is_not_there_says_what_is_accepted(name: str) -> None:
    with pytest.raises(MissingInput) as caught:
        read_documents(name)
    assert all(part in str(caught.value) for part in (name, ".jsonl", ".txt", ".parquet", "owner/name", "-"))


def test_another_suffix_and_a_folder_without_files_name_the_suffixes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a")
    for source, error in ((tmp_path / "a.csv", UnsupportedFormat), (tmp_path, InvalidInput)):
        with pytest.raises(error, match=r"\.jsonl, \.txt, \.parquet"):
            read_documents(source)


def empty_input(monkeypatch: pytest.MonkeyPatch) -> str:
    feed(monkeypatch, b"")
    return "-"


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        pytest.param(lambda _: [], ["holds no document"], id="empty_list"),
        pytest.param(empty_input, ["Standard input holds no document"], id="empty_standard_input"),
        pytest.param(lambda _: {"text": "a"}, ["type dict", "into a list"], id="one_dict"),
        pytest.param(lambda _: 3, ["type int", ".jsonl", "owner/name"], id="a_number"),
        pytest.param(lambda _: ["a", 3], ["Document 2", "type int", "'text'"], id="list_with_a_number"),
    ],
)
def test_values_that_are_no_dataset_are_refused(
    make: Callable[[pytest.MonkeyPatch], Any], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput) as caught:
        list(read_documents(make(monkeypatch)))
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("options", [{"split": "train"}, {"config": "a"}, {"revision": "b"}], ids=str)
def test_options_that_would_change_nothing_are_refused(options: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InvalidInput, match="leave it out"):
        read_documents(tmp_path, **options)  # type: ignore[arg-type]


def test_a_hub_dataset_without_the_library_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match=r"pip install 'actstore\[datasets\]'"):
        read_documents("owner/name")


def test_a_document_is_made_of_text() -> None:
    with pytest.raises(InvalidInput, match="type int"):
        Document(3)  # type: ignore[arg-type]


def test_importing_the_room_imports_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'datasets', 'pyarrow', 'zarr', 'duckdb'}"
    code = f"import sys, actstore.corpus; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
