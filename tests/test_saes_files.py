"""A sound file is read to the bit; a hostile, damaged or inconsistent one is refused by name, in bounded memory."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from saes_support import INNER, Arrays, random_arrays, write_sae

from actstore.errors import InvalidInput, MissingInput
from actstore.saes import SparseCoder, check_width, expand_sae_arguments, load_sae, sae_sizes


def _load(folder: Path) -> SparseCoder:
    return load_sae(expand_sae_arguments([str(folder)])[0])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "deflated"])
def test_a_file_is_read_to_the_bit(tmp_path: Path, save: Callable[..., None]) -> None:
    folder, arrays = write_sae(tmp_path), random_arrays()
    save(folder / "params.npz", **arrays)
    coder = _load(folder)
    for name, array in arrays.items():
        np.testing.assert_array_equal(getattr(coder, name.lower()), array, strict=True)
    identity = coder.identity
    assert (coder.d_in, coder.d_sae) == (identity.d_in, identity.width) == (10, 48)
    assert (identity.sae, identity.site, identity.declared_l0) == ("3-tiny-scope-res-48__l0-12", "resid_post.3", 12.0)
    assert (identity.architecture, identity.release, identity.sae_id) == ("jumprelu", "tiny-scope-res", INNER)
    assert identity.weights_digest == hashlib.sha256((folder / "params.npz").read_bytes()).hexdigest()


def test_lower_case_names_and_float16_are_read(tmp_path: Path) -> None:
    arrays = {name.lower(): array.astype(np.float16) for name, array in random_arrays().items()}
    coder = _load(write_sae(tmp_path, arrays=arrays))
    assert coder.w_enc.dtype == np.float32
    np.testing.assert_array_equal(coder.w_dec, arrays["w_dec"].astype(np.float32))


def test_column_major_arrays_are_read(tmp_path: Path) -> None:
    arrays = random_arrays()
    coder = _load(write_sae(tmp_path, arrays={name: np.asfortranarray(array) for name, array in arrays.items()}))
    np.testing.assert_array_equal(coder.w_enc, arrays["W_enc"])


class Canary:
    """Executes when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def _save(file: Path | io.BytesIO, arrays: Arrays) -> None:
    np.savez(file, allow_pickle=True, **arrays)


def _bad(name: str, array: Any) -> Callable[[Path, Arrays], None]:
    return lambda path, arrays: _save(path, arrays | {name: array})


def _without(*names: str) -> Callable[[Path, Arrays], None]:
    return lambda path, arrays: _save(path, {name: array for name, array in arrays.items() if name not in names})


def _changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path, Arrays], None]:
    return lambda path, arrays: _save(path, arrays | {name: change(arrays[name])})


def _poke(name: str, value: float) -> Callable[[Path, Arrays], None]:
    def write(path: Path, arrays: Arrays) -> None:
        arrays[name].flat[7] = value
        _save(path, arrays)

    return write


def _bytes(content: Callable[[bytes], bytes]) -> Callable[[Path, Arrays], None]:
    def write(path: Path, arrays: Arrays) -> None:
        buffer = io.BytesIO()
        _save(buffer, arrays)
        path.write_bytes(content(buffer.getvalue()))

    return write


def _npy(shape: str, data: bytes, descr: str = "<f4", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    return _headed(text.ljust(117) + "\n", version) + data


def _headed(header: str, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header.encode()


NO_HEADERS = {
    "an open text": "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), '''",
    "open brackets": "{'descr': '<f4', ((",
    "signs": "-" * 9000 + "1",
    "inversions": "~" * 5000 + "1",
    "indentation": "  x\n y\n",
    "a key that cannot be one": "{[]: 1}",
    "a set of dicts": "{{}: 1}",
    "a type of one name": "{'descr': [('a',)], 'fortran_order': False, 'shape': (2,)}",
    "a type of a number": "{'descr': 5, 'fortran_order': False, 'shape': (2,)}",
    "code": "{'descr': __import__('os'), 'fortran_order': False, 'shape': (2,)}",
}


def _entry(name: str, content: bytes, *, compression: int = zipfile.ZIP_STORED) -> Callable[[Path, Arrays], None]:
    def write(path: Path, arrays: Arrays) -> None:
        _without(name)(path, arrays)
        with zipfile.ZipFile(path, "a", compression) as archive:
            archive.writestr(f"{name}.npy", content)

    return write


def _twice(path: Path, arrays: Arrays) -> None:
    _save(path, arrays)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("b_enc.npy", _npy("(48,)", bytes(192)))


def _flip_far_in(name: str) -> Callable[[Path, Arrays], None]:
    def flip(data: bytes) -> bytes:
        at = data.index(f"{name}.npy".encode()) + 20_000
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return lambda path, _: _bytes(flip)(path, random_arrays(d_in=200))


HOSTILE = [
    pytest.param(
        _entry("b_enc", _npy(f"({'9' * 40}, {'9' * 40})", bytes(192))), "b_enc.npy cannot be read", id="endless"
    ),
    pytest.param(_bytes(lambda data: b"not a zip at all"), "not an npz archive", id="no_archive"),
    pytest.param(_bytes(lambda data: b""), "not an npz archive", id="empty"),
    pytest.param(_bytes(lambda data: data[: len(data) // 2]), "not an npz archive, or is cut short", id="cut_in_half"),
    pytest.param(_bytes(lambda data: data[:-10]), "not an npz archive, or is cut short", id="cut_at_the_end"),
    pytest.param(_bytes(lambda data: pickle.dumps({"W_enc": 1})), "not an npz archive", id="bare_pickle"),
    pytest.param(_flip_far_in("W_dec"), "w_dec is damaged", id="one_bit"),
    pytest.param(_without("threshold", "b_dec"), "b_dec is missing; threshold is missing", id="two_missing"),
    pytest.param(_bad("W_skip", np.ones((10, 10), np.float32)), "W_skip is not part of the format", id="unknown"),
    pytest.param(_bad("w_enc", np.ones((10, 48), np.float32)), "w_enc is there twice", id="both_spellings"),
    pytest.param(_twice, "b_enc is there twice", id="entry_twice"),
    pytest.param(_bad("b_enc", np.ones(48)), "b_enc is float64", id="float64"),
    pytest.param(_bad("b_enc", np.ones(48, np.int32)), "b_enc is int32", id="integers"),
    pytest.param(_bad("b_enc", np.ones(48, ">f4")), "b_enc is >f4", id="big_endian"),
    pytest.param(_bad("b_enc", np.ones(48, "U4")), "b_enc is <U4", id="text"),
    pytest.param(
        _changed("W_dec", lambda array: array.T), r"w_dec is \(10, 48\) \(it is transposed\)", id="decoder_turned"
    ),
    pytest.param(
        _changed("W_enc", lambda array: array.T), r"w_enc is \(48, 10\) \(it is transposed\)", id="encoder_turned"
    ),
    pytest.param(_changed("threshold", lambda array: array[:-1]), r"threshold is \(47,\)", id="short_threshold"),
    pytest.param(_changed("b_dec", lambda array: array[None]), r"b_dec is \(1, 10\), not a vector", id="bias_matrix"),
    pytest.param(_changed("threshold", lambda array: array[0]), r"threshold is \(\)", id="scalar_threshold"),
    pytest.param(_poke("W_enc", float("nan")), "w_enc has NaN or infinity", id="nan"),
    pytest.param(_poke("b_dec", float("inf")), "b_dec has NaN or infinity", id="infinity"),
    pytest.param(_poke("threshold", 0.0), "1 thresholds are not positive", id="zero_threshold"),
    pytest.param(_poke("threshold", -1.0), "1 thresholds are not positive", id="negative_threshold"),
    pytest.param(_entry("b_enc", b"junk"), "b_enc.npy cannot be read as an array", id="no_header"),
    pytest.param(_entry("b_enc", _npy("(48,)", bytes(100))), "claims 192 bytes .* and has 100", id="short_array"),
    pytest.param(_entry("b_enc", _npy("(48,)", bytes(999))), "claims 192 bytes .* and has 999", id="long_array"),
    pytest.param(
        _entry("b_enc", _npy("(1099511627776,)", bytes(192))), "claims 4,398,046,511,104 bytes", id="terabytes_claimed"
    ),
    pytest.param(
        _entry("b_enc", _npy("(-48,)", bytes(192))), "b_enc.npy cannot be read as an array", id="negative_shape"
    ),
    pytest.param(_entry("b_enc", _npy("(48,)", bytes(192), "|O")), "Python objects", id="objects_by_header"),
    pytest.param(_entry("b_enc", _npy("__import__('os')", b"")), "cannot be read as an array", id="code_in_a_header"),
    *(
        pytest.param(_entry("b_enc", _headed(text)), "b_enc.npy cannot be read", id=id)
        for id, text in NO_HEADERS.items()
    ),
    pytest.param(
        _entry("W_enc", _npy("(10, 2097152)", bytes(80 << 20)), compression=zipfile.ZIP_DEFLATED),
        "which no weights do",
        id="bomb",
    ),
]


@pytest.mark.parametrize(("write", "message"), HOSTILE)
def test_a_file_that_cannot_be_trusted_is_refused(
    tmp_path: Path, write: Callable[[Path, Arrays], None], message: str
) -> None:
    folder = write_sae(tmp_path)
    write(folder / "params.npz", random_arrays())
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInput, match=message) as refusal:
            _load(folder)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5_000_000
    assert str(folder / "params.npz") in str(refusal.value) and "Next:" in str(refusal.value)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = write_sae(tmp_path, arrays=random_arrays() | {"b_enc": np.array([Canary(canary)], dtype=object)})
    with pytest.raises(InvalidInput, match="b_enc holds Python objects"):
        _load(folder)
    assert not canary.exists()
    np.load(folder / "params.npz", allow_pickle=True)["b_enc"]
    assert canary.exists(), "the canary is alive: opening it does execute"


def test_all_faults_are_in_one_message(tmp_path: Path) -> None:
    folder = write_sae(tmp_path, arrays=random_arrays() | {"b_enc": np.ones(48), "b_dec": np.ones(10, "U1")})
    with pytest.raises(InvalidInput, match=r"b_enc is float64.*b_dec is <U1"):
        _load(folder)


def test_a_width_that_is_not_the_names_is_refused(tmp_path: Path) -> None:
    folder = write_sae(tmp_path, "layer_3/width_16k/average_l0_12")
    with pytest.raises(InvalidInput, match="48 features, and 16,384 by its name width_16k"):
        _load(folder)


def test_sizes_come_with_the_same_refusals(tmp_path: Path) -> None:
    folder = write_sae(tmp_path)
    (folder / "params.npz").write_bytes(b"junk")
    with pytest.raises(InvalidInput, match="not an npz archive"):
        sae_sizes(expand_sae_arguments([str(folder)])[0])


def test_a_file_that_went_away(tmp_path: Path) -> None:
    folder = write_sae(tmp_path)
    (resolved,) = expand_sae_arguments([str(folder)])
    (folder / "params.npz").unlink()
    with pytest.raises(MissingInput, match="not there any more"):
        load_sae(resolved)


def test_an_sae_must_be_as_wide_as_its_site(tmp_path: Path) -> None:
    coder = _load(write_sae(tmp_path))
    check_width(coder, 10)
    with pytest.raises(InvalidInput, match=r"width 10, and the site resid_post\.3 of this model has width 24"):
        check_width(coder, 24)
