"""Files of `torch.save` are opened where the user says so, for their tensors alone."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from saes_support import plain_tensors

from actstore.errors import InvalidInput, UnsupportedFormat
from actstore.saes import SaeEncoder, SparseCoder, expand_sae_arguments, load_sae

torch.set_num_threads(1)

ROWS = np.random.default_rng(5).normal(size=(64, 10)) * 2 + 0.5
State = dict[str, Any]
Matrix = npt.NDArray[np.float64]


def state_of(name: str) -> State:
    """Return the state of one of the library's classes, as its table of tensors says."""
    plain = {key: torch.from_numpy(array) for key, array in plain_tensors().items()}
    random = torch.Generator().manual_seed(3)
    linear = {
        "encoder.weight": plain["W_enc"].T.clone(),
        "encoder.bias": plain["b_enc"],
        "decoder.weight": plain["W_dec"].T.clone(),
    }
    top = {"k": torch.tensor(5), "threshold": torch.tensor(0.75)}
    if name == "AutoEncoder":
        return linear | {"bias": plain["b_dec"]}
    if name == "AutoEncoderNew":
        return linear | {"decoder.bias": plain["b_dec"]}
    if name == "GatedAutoEncoder":
        vectors = {key: torch.randn(48, generator=random) for key in ("r_mag", "gate_bias", "mag_bias")}
        del linear["encoder.bias"]
        return linear | {"decoder_bias": plain["b_dec"]} | vectors
    if name in ("AutoEncoderTopK", "BatchTopKSAE"):
        return linear | {"b_dec": plain["b_dec"]} | top
    if name == "MatryoshkaBatchTopKSAE":
        return plain | top | {"group_sizes": torch.tensor([16, 32])}
    return plain | {"threshold": torch.rand(48, generator=random) + 0.2}


def features_of(name: str, state: State, x: Matrix) -> Matrix:
    """The table's column `encode`, in float64."""
    t = {key: value.double().numpy() for key, value in state.items()}
    w_enc = t["W_enc"] if "W_enc" in t else t["encoder.weight"].T
    if name == "GatedAutoEncoder":
        h = (x - t["decoder_bias"]) @ w_enc
        gated: Matrix = (h + t["gate_bias"] > 0) * np.maximum(np.exp(t["r_mag"]) * h + t["mag_bias"], 0)
        return gated
    centre = t["bias"] if name == "AutoEncoder" else t["b_dec"] if "TopK" in name else 0.0
    a: Matrix = np.maximum((x - centre) @ w_enc + t.get("encoder.bias", t.get("b_enc")), 0)
    if name == "AutoEncoderTopK":
        return np.where(a >= np.sort(a, axis=1)[:, -5][:, None], a, 0)
    return a * (a > t["threshold"]) if "threshold" in t else a


def write(root: Path, name: str, state: object | None = None, **changes: Any) -> Path:
    folder = root / "trainer_0"
    folder.mkdir(exist_ok=True)
    torch.save(state_of(name) if state is None else state, folder / "ae.pt")
    trainer = {
        "dict_class": name,
        "activation_dim": 10,
        "dict_size": 48,
        "k": 5,
        "submodule_name": "resid_post_layer_3",
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer | changes, "buffer": {"ctx_len": 128}}))
    return folder


def _load(folder: Path) -> SparseCoder:
    return load_sae(expand_sae_arguments([str(folder)], allow_pt=True)[0])


CLASSES = [
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_its_equation(tmp_path: Path, name: str) -> None:
    state = state_of(name)
    coder = _load(write(tmp_path, name, state))
    features = features_of(name, state, ROWS)
    tile = SaeEncoder(coder, "cpu").encode(torch.from_numpy(ROWS))
    found = np.zeros((64, 48), np.float32)
    found[np.repeat(np.arange(64), tile.counts.numpy()), tile.features.numpy()] = tile.activations.numpy()
    assert 0.01 < (features > 0).mean() < 0.9
    np.testing.assert_allclose(found, features, rtol=2e-4, atol=2e-5)
    t = {key: value.double().numpy() for key, value in state.items()}
    bias = next(t[key] for key in ("b_dec", "bias", "decoder.bias", "decoder_bias") if key in t)
    decoded = features @ (t["W_dec"] if "W_dec" in t else t["decoder.weight"].T) + bias
    np.testing.assert_allclose(
        tile.reconstruction[:, 2].numpy(), np.linalg.norm(ROWS - decoded, axis=1), rtol=1e-4, atol=1e-5
    )
    assert coder.identity.site == "resid_post.3"


def test_nothing_is_opened_unasked(tmp_path: Path) -> None:
    folder = write(tmp_path, "AutoEncoder")
    for source in (folder, folder / "ae.pt", tmp_path):
        with pytest.raises(UnsupportedFormat, match=r"ae\.pt, a pickle.*--allow-pt"):
            expand_sae_arguments([str(source)])


class Canary:
    """Executes when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = write(tmp_path, "AutoEncoder", state_of("AutoEncoder") | {"bias": Canary(canary)})
    with pytest.raises(InvalidInput, match="it holds more than tensors"):
        _load(folder)
    assert not canary.exists()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _packed(path: Path) -> None:
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1 << 20))


@pytest.mark.parametrize(
    ("damage", "message"), [(_cut, "not what torch.save writes"), (_packed, "would unpack to")], ids=["cut", "bomb"]
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write(tmp_path, "AutoEncoder")
    damage(folder / "ae.pt")
    with pytest.raises(InvalidInput, match=message):
        _load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"k": torch.tensor(7)}, "k is 7, and 5 by its config", id="another_k"),
        pytest.param({"k": torch.tensor([5, 5])}, r"k is \(2,\), not one number", id="two_ks"),
        pytest.param({"k": torch.zeros(0)}, r"k is \(0,\), not one number", id="no_k"),
        pytest.param({"b_dec": torch.ones(10) * 1j}, "b_dec is no tensor of real numbers", id="complex"),
        pytest.param({"b_dec": torch.ones(10) > 0}, "b_dec is no tensor of real numbers", id="true_or_false"),
        pytest.param({"b_dec": torch.zeros(10).expand(1 << 40, 10)}, "claims more than the file holds", id="strides"),
        pytest.param({"b_dec": "zeros"}, "b_dec is no tensor", id="text"),
        pytest.param({"extra": torch.zeros(3)}, "extra is not part of the format", id="unknown"),
        pytest.param({"b_dec": torch.full((10,), torch.nan)}, "b_dec has NaN", id="nan"),
    ],
)
def test_a_state_that_cannot_be_trusted_is_refused(tmp_path: Path, changes: State, message: str) -> None:
    folder = write(tmp_path, "AutoEncoderTopK", state_of("AutoEncoderTopK") | changes)
    with pytest.raises(InvalidInput, match=message):
        _load(folder)


def test_what_training_went_by_is_not_read(tmp_path: Path) -> None:
    """Older states of a TopK have no threshold, and other tensors that no equation needs may hold anything."""
    state = state_of("AutoEncoderTopK")
    del state["threshold"]
    assert _load(write(tmp_path, "AutoEncoderTopK", state)).k == 5
    state = state_of("MatryoshkaBatchTopKSAE") | {"group_sizes": torch.zeros(0), "k": torch.tensor([torch.nan])}
    coder = _load(write(tmp_path, "MatryoshkaBatchTopKSAE", state))
    np.testing.assert_array_equal(coder.threshold, np.full(48, 0.75))


def test_parameters_are_tensors(tmp_path: Path) -> None:
    state = {key: torch.nn.Parameter(value) for key, value in state_of("AutoEncoder").items()}
    coder = _load(write(tmp_path, "AutoEncoder", state))
    np.testing.assert_array_equal(coder.b_dec, state["bias"].detach())


def test_a_threshold_for_each_feature_is_refused(tmp_path: Path) -> None:
    state = state_of("BatchTopKSAE") | {"threshold": torch.full((48,), 0.75)}
    with pytest.raises(InvalidInput, match=r"threshold is \(48,\), not one number"):
        _load(write(tmp_path, "BatchTopKSAE", state))


def test_an_untrained_threshold_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "BatchTopKSAE", state_of("BatchTopKSAE") | {"threshold": torch.tensor(-1.0)})
    with pytest.raises(InvalidInput, match="threshold is not positive"):
        _load(folder)


def test_a_class_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match='dict_class is "CrossCoder"'):
        _load(write(tmp_path, "CrossCoder", state_of("AutoEncoder")))
