"""A safetensors file is refused by name where its header and its bytes contradict anything, in bounded memory."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saes_support import Arrays, plain_tensors, write_saelens
from safetensors.numpy import save

from actstore.errors import InvalidInput
from actstore.saes import expand_sae_arguments, load_sae, sae_sizes

Change = Callable[[bytes], bytes]


def _saved(change: Callable[[Arrays], Any]) -> Change:
    def write(_: bytes) -> bytes:
        arrays = plain_tensors()
        arrays = change(arrays) or arrays
        content: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        return content

    return write


def _poke(name: str, value: float) -> Change:
    def poke(arrays: Arrays) -> None:
        arrays[name].flat[7] = value

    return _saved(poke)


def _header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Change the header's entries and keep the tensors' bytes."""

    def write(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        text: bytes = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return write


def _entry(**changes: Any) -> Change:
    return _header(lambda header: header["b_enc"].update(changes))


HOSTILE = [
    pytest.param(lambda _: b"", "not a safetensors file", id="empty"),
    pytest.param(lambda _: b"not a safetensors file at all", "not a safetensors file", id="other"),
    pytest.param(
        lambda content: content[: len(content) // 2], "its tensors end at byte .*, and the file at", id="half"
    ),
    pytest.param(lambda content: content[:100], "not a safetensors file", id="header_cut"),
    pytest.param(lambda content: content + b"more", "its tensors end at byte", id="more"),
    pytest.param(lambda content: b"\xff" * 8 + content[8:], "not a safetensors file", id="endless_header"),
    pytest.param(_header(lambda _: b"[1, 2]"), "its header is not an object", id="header_list"),
    pytest.param(_header(lambda _: b"{" * 90), "its header cannot be read", id="header_broken"),
    pytest.param(_header(lambda _: b"[" * 200_000), "its header cannot be read", id="header_deep"),
    pytest.param(_header(lambda _: b'{"a": 1, "a": 2}'), "a is there twice", id="name_twice"),
    pytest.param(_entry(dtype="F64"), "b_enc is F64, where F32", id="float64"),
    pytest.param(_entry(dtype="I32"), "b_enc is I32", id="integers"),
    pytest.param(_entry(dtype=["F32"]), "b_enc has a header", id="type_list"),
    pytest.param(_entry(shape=[1 << 40]), "b_enc claims 4,398,046,511,104 bytes", id="terabytes"),
    pytest.param(_entry(shape=[-48]), "b_enc has a header", id="negative"),
    pytest.param(_entry(shape=[10**4000, 10**4000]), "b_enc has a header", id="more_digits_than_are_written"),
    pytest.param(_entry(shape=[1] * 60_000), "b_enc has a header", id="thousands_of_axes"),
    pytest.param(_entry(shape=[True, 48]), "b_enc has a header", id="true"),
    pytest.param(_entry(data_offsets=[40, 20]), "b_enc has a header", id="backwards"),
    pytest.param(_entry(data_offsets=[0, 192]), "overlap or leave gaps", id="overlap"),
    pytest.param(_entry(data_offsets="0, 192"), "b_enc has a header", id="text"),
    pytest.param(_header(lambda header: header.update(b_enc=7)), "b_enc has a header", id="number"),
    pytest.param(_saved(lambda arrays: arrays.pop("b_dec") is None), "b_dec is missing", id="missing"),
    pytest.param(_saved(lambda arrays: arrays | {"W_skip": arrays["W_dec"]}), "W_skip is not part", id="unknown"),
    pytest.param(_saved(lambda arrays: arrays | {"w_dec": arrays["W_dec"]}), "w_dec is there twice", id="spellings"),
    pytest.param(
        _saved(lambda arrays: arrays | {"W_dec": arrays["W_dec"].T}), r"\(10, 48\) \(it is transposed\)", id="turned"
    ),
    pytest.param(
        _saved(lambda arrays: arrays | {"W_enc": arrays["W_enc"][:-1], "W_dec": arrays["W_dec"][:-1]}),
        r"w_enc is \(9, 48\).*w_dec is \(47, 10\)",
        id="all_shapes",
    ),
    pytest.param(_saved(lambda arrays: arrays | {"b_enc": arrays["b_enc"][None]}), "not a vector", id="bias_matrix"),
    pytest.param(_poke("W_enc", float("nan")), "w_enc has NaN or infinity", id="nan"),
    pytest.param(_poke("b_dec", float("-inf")), "b_dec has NaN or infinity", id="infinity"),
]


def test_thousands_of_tensors_are_refused_in_a_few_words(tmp_path: Path) -> None:
    """Both what is unknown and what is there twice: in a moment, and not by all their names."""
    path = write_saelens(tmp_path, plain_tensors()) / "sae_weights.safetensors"
    (resolved,) = expand_sae_arguments([str(path)])
    content = path.read_bytes()
    empty = {f"tensor_{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(60_000)}
    path.write_bytes(_header(lambda header: header | empty)(content))
    with pytest.raises(InvalidInput, match=r"tensor_9 is not part of the format; and 59,990 more") as refusal:
        load_sae(resolved)
    path.write_bytes(_header(lambda header: json.dumps(header | empty).encode()[:-1] + b',"tensor_7": 1}')(content))
    with pytest.raises(InvalidInput, match="tensor_7 is there twice"):
        load_sae(resolved)
    assert len(str(refusal.value)) < 2000


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_a_file_that_cannot_be_trusted_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    path = write_saelens(tmp_path, plain_tensors()) / "sae_weights.safetensors"
    path.write_bytes(change(path.read_bytes()))
    (resolved,) = expand_sae_arguments([str(path)])
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=message) as refusal:
            load_sae(resolved)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5_000_000
    assert str(path) in str(refusal.value) and "Next:" in str(refusal.value)


@pytest.mark.parametrize(
    ("threshold", "message"), [(0.0, "1 thresholds are not positive"), (np.nan, "threshold has NaN or infinity")]
)
def test_thresholds_are_judged(tmp_path: Path, threshold: float, message: str) -> None:
    thresholds = np.ones(48, np.float32)
    thresholds[7] = threshold
    folder = write_saelens(tmp_path, plain_tensors() | {"threshold": thresholds}, architecture="jumprelu")
    with pytest.raises(InvalidInput, match=message):
        load_sae(expand_sae_arguments([str(folder)])[0])


def test_a_gate_that_overflows_is_refused(tmp_path: Path) -> None:
    tensors = plain_tensors()
    tensors["b_mag"] = tensors.pop("b_enc")
    gate = {"b_gate": np.ones(48, np.float32), "r_mag": np.full(48, 500, np.float32)}
    folder = write_saelens(tmp_path, tensors | gate, architecture="gated")
    with pytest.raises(InvalidInput, match="w_enc has NaN or infinity"):
        load_sae(expand_sae_arguments([str(folder)])[0])


def test_sizes_come_with_the_same_refusals(tmp_path: Path) -> None:
    path = write_saelens(tmp_path, plain_tensors()) / "sae_weights.safetensors"
    path.write_bytes(b"junk")
    with pytest.raises(InvalidInput, match="not a safetensors file"):
        sae_sizes(expand_sae_arguments([str(path)])[0])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_byte_changed_in_the_header_never_surprises(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "sae"
    path = folder / "sae_weights.safetensors"
    if not folder.exists():
        write_saelens(tmp_path, plain_tensors())
        (tmp_path / "sound").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "sound").read_bytes())
    at = data.draw(st.integers(0, 8 + int.from_bytes(content[:8], "little") - 1))
    content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        coder = load_sae(expand_sae_arguments([str(folder)])[0])
    except InvalidInput:
        return
    assert (coder.d_in, coder.d_sae) == (10, 48)


def test_a_file_that_was_made_long_is_not_read(tmp_path: Path) -> None:
    path = write_saelens(tmp_path, plain_tensors()) / "sae_weights.safetensors"
    os.truncate(path, 1 << 34)
    with pytest.raises(InvalidInput, match="its tensors end at byte"):
        load_sae(expand_sae_arguments([str(path)])[0])
