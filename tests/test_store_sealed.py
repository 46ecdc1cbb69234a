"""Sealed documents: one spelling of a value, and no byte of it can change unnoticed."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import CorruptStore
from actstore.sealed import canonical_json, digest_of, read_sealed, seal, unseal, write_durably, write_sealed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.dictionaries(st.text(max_size=8).filter(lambda key: key != "digest"), VALUES, max_size=4)


@given(BODIES)
def test_what_was_sealed_is_read_again(body: dict[str, object]) -> None:
    assert unseal(seal(body), "x") == body


@settings(deadline=None)
@given(body=BODIES, data=st.data())
def test_any_single_changed_byte_is_refused(body: dict[str, object], data: st.DataObject) -> None:
    sealed = bytearray(seal(body))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] = data.draw(st.integers(0, 255).filter(lambda value: value != sealed[place]))

    with pytest.raises(CorruptStore, match=r"layout\.json.*verify"):
        unseal(bytes(sealed), "layout.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: data.replace(b'"a":1', b'"a": 1'),
        lambda data: data.replace(b'"a":1,', b""),
        lambda data: data.replace(b'"a":1', b'"a":1,"a":1'),
        lambda data: b"",
        lambda data: b"[]\n",
        lambda data: b"\xff\xfe",
    ],
    ids=["no newline", "two newlines", "indented", "spaced", "less", "twice", "empty", "a list", "not text"],
)
def test_another_spelling_of_the_same_is_refused(change: object) -> None:
    assert callable(change)
    with pytest.raises(CorruptStore):
        unseal(change(seal({"a": 1, "b": "é"})), "x")


@pytest.mark.parametrize("name", ["store.json", "layout.json", "pass.json"])
def test_every_bit_of_a_file_counts(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_sealed(path, {"name": name, "rows": [1, 2, 3], "share": 0.1})
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(CorruptStore):
            read_sealed(path)


def test_the_canonical_spelling_is_one() -> None:
    assert canonical_json({"b": [1, 1.5, None], "a": "é\n"}) == '{"a":"é\\n","b":[1,1.5,null]}'.encode()


@pytest.mark.parametrize("keys", [(), ("a",), ("z",), ("a", "z"), ("diges", "digest0", "é"), ("", 'dig"est', "digesu")])
def test_the_digest_stands_where_its_key_sorts(keys: tuple[str, ...]) -> None:
    body = {key: [key, {"digest": 1}] for key in keys}
    plain = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    with_digest = {**body, "digest": hashlib.sha256(plain.encode()).hexdigest()}
    expected = json.dumps(with_digest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert seal(body) == expected.encode() + b"\n"


@given(BODIES)
def test_order_of_keys_does_not_matter(body: dict[str, object]) -> None:
    assert digest_of(dict(reversed(body.items()))) == digest_of(body)


@given(BODIES)
def test_the_canonical_spelling_survives_any_json_reader(body: dict[str, object]) -> None:
    assert canonical_json(json.loads(canonical_json(body))) == canonical_json(body)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"number": number})


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    write_durably(path, b"before")

    with pytest.raises(TypeError):
        write_durably(path, "text, not bytes")  # type: ignore[arg-type]

    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("layout.json", b"before")]
