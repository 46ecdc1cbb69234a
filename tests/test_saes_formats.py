"""Every format, written by the test from its published description, encodes and decodes as its equation says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from saes_support import (
    Arrays,
    plain_tensors,
    random_arrays,
    write_gemma_scope_2,
    write_llama_scope,
    write_saelens,
    write_sparsify,
)
from safetensors.numpy import save_file

from actstore.errors import InvalidInput
from actstore.saes import SaeEncoder, SparseCoder, expand_sae_arguments, load_sae, sae_sizes
from actstore.saes.rules import keep_largest

torch.set_num_threads(1)

Matrix = npt.NDArray[np.float64]


def _load(folder: Path, site: str = "") -> SparseCoder:
    return load_sae(expand_sae_arguments([f"{folder}{site}"])[0])


def _rows() -> npt.NDArray[np.float32]:
    rows = np.random.default_rng(5).normal(size=(64, 10)) * 2 + 0.5
    rows[3] = 0  # a row without a direction
    return rows.astype(np.float32)


ROWS = _rows()


def encoded(coder: SparseCoder) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the features (row, feature) and the error norms that the product gives for `ROWS`."""
    tile = SaeEncoder(coder, "cpu").encode(torch.from_numpy(ROWS))
    features = np.zeros((len(ROWS), coder.d_sae), np.float32)
    features[np.repeat(np.arange(len(ROWS)), tile.counts.numpy()), tile.features.numpy()] = tile.activations.numpy()
    return features, tile.reconstruction[:, 2].numpy()


def expect(coder: SparseCoder, features: Matrix, decoded: Matrix) -> None:
    """Hold the product against features and reconstructions computed in float64."""
    assert 0.01 < (features > 0).mean() < 0.9, "some fire and some do not"
    found, error_norms = encoded(coder)
    np.testing.assert_allclose(found, features, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(error_norms, np.linalg.norm(ROWS - decoded, axis=1), rtol=1e-4, atol=1e-5)


def relu(x: Matrix) -> Matrix:
    return np.maximum(x, 0)


def top(x: Matrix, k: int) -> Matrix:
    kept = np.zeros_like(x)
    for row, values in enumerate(x):
        for feature in sorted(range(len(values)), key=lambda one: (-values[one], one))[:k]:
            kept[row, feature] = values[feature]
    return kept


def normalised(kind: str) -> tuple[Matrix, Callable[[Matrix], Matrix]]:
    """Return the rows as SAELens normalises them, and how it undoes that."""
    x = ROWS.astype(np.float64)
    if kind == "layer_norm":
        mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
        return (x - mean) / (std + 1e-5), lambda out: out * std + mean
    if kind == "constant_norm_rescale":
        length = np.linalg.norm(x, axis=1, keepdims=True)
        coefficient = np.sqrt(10) / np.where(length > 0, length, np.inf)
        return x * coefficient, lambda out: out * length / np.sqrt(10)
    return x, lambda out: out


def equation(architecture: str, tensors: Arrays, z: Matrix) -> Matrix:
    """The features of centred rows, by the table of what SAELens' classes compute."""
    t = {name: array.astype(np.float64) for name, array in tensors.items()}
    if architecture == "gated":
        gate = z @ t["W_enc"] + t["b_gate"] > 0
        return gate * relu(z @ (t["W_enc"] * np.exp(t["r_mag"])) + t["b_mag"])
    pre = z @ t["W_enc"] + t["b_enc"]
    if architecture == "jumprelu":
        return relu(pre) * (pre > t["threshold"])
    return relu(top(pre, 5)) if architecture == "topk" else relu(pre)


def saelens_tensors(architecture: str) -> Arrays:
    tensors, random = plain_tensors(), np.random.default_rng(9)
    if architecture == "jumprelu":
        tensors["threshold"] = random.uniform(0.2, 2.0, 48).astype(np.float32)
    if architecture == "gated":
        del tensors["b_enc"]
        for name in ("b_gate", "b_mag", "r_mag"):
            tensors[name] = random.normal(size=48).astype(np.float32)
    return tensors


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("subtracts", [True, False], ids=["b_dec_subtracted", "as_it_is"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_saelens(tmp_path: Path, architecture: str, subtracts: bool, normalisation: str) -> None:
    tensors = saelens_tensors(architecture)
    folder = write_saelens(
        tmp_path,
        tensors,
        architecture=architecture,
        k=5 if architecture == "topk" else None,
        apply_b_dec_to_input=subtracts,
        normalize_activations=normalisation,
    )
    coder = _load(folder)
    z, undo = normalised(normalisation)
    features = equation(architecture, tensors, z - tensors["b_dec"] if subtracts else z)
    expect(coder, features, undo(features @ tensors["W_dec"].astype(np.float64) + tensors["b_dec"]))
    identity = coder.identity
    assert (identity.site, identity.sae) == ("resid_pre.3", "resid_pre.3-sae")
    assert identity.architecture.split()[0] == architecture
    assert identity.weights_digest == hashlib.sha256((folder / "sae_weights.safetensors").read_bytes()).hexdigest()


def test_all_that_changes_the_equation_stands_in_the_architecture(tmp_path: Path) -> None:
    options = {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True}
    folder = write_saelens(tmp_path, plain_tensors(), **options, normalize_activations="layer_norm")
    assert _load(folder).identity.architecture == "topk k=5 by_decoder_norm x-b_dec layer_norm"
    write_saelens(tmp_path, plain_tensors(), apply_b_dec_to_input=False)
    assert _load(folder).identity.architecture == "standard"


def test_saelens_topk_by_decoder_norm(tmp_path: Path) -> None:
    tensors = plain_tensors()
    coder = _load(write_saelens(tmp_path, tensors, architecture="topk", k=5, rescale_acts_by_decoder_norm=True))
    norm = np.linalg.norm(tensors["W_dec"].astype(np.float64), axis=1)
    pre = (ROWS.astype(np.float64) - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    features = relu(top(pre * norm, 5))
    expect(coder, features, (features / norm) @ tensors["W_dec"] + tensors["b_dec"])


def test_what_writes_nothing_never_fires(tmp_path: Path) -> None:
    """By the decoder's norms it is multiplied by 0, as by sae-lens, and takes no other feature's place."""
    tensors = plain_tensors()
    tensors["W_dec"][7] = 0
    tensors["b_enc"][7] = 1000
    coder = _load(write_saelens(tmp_path, tensors, architecture="topk", k=5, rescale_acts_by_decoder_norm=True))
    norm = np.linalg.norm(tensors["W_dec"].astype(np.float64), axis=1)
    pre = (ROWS.astype(np.float64) - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    features = relu(top(pre * norm, 5))
    expect(coder, features, (features / np.where(norm > 0, norm, 1)) @ tensors["W_dec"] + tensors["b_dec"])


OLD = {
    "metadata": None,
    "reshape_activations": None,
    "hook_name": "blocks.3.hook_resid_pre",
    "hook_layer": 3,
    "l1_coefficient": 8e-5,
}


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        pytest.param({}, "standard", id="defaults"),
        pytest.param({"apply_b_dec_to_input": None, "normalize_activations": False}, "standard", id="nothing_said"),
        pytest.param({"hook_name": None, "hook_point": "blocks.3.hook_resid_pre"}, "standard", id="hook_point"),
        pytest.param({"hook_point": "blocks.3.hook_resid_pre", "model_name": "gemma-2b"}, "standard", id="oldest"),
        pytest.param(
            {
                "hook_point": "blocks.3.hook_resid_pre",
                "model_name": "gpt2-small",
                "model_from_pretrained_kwargs": {"center_writing_weights": False},
            },
            "standard",
            id="not_centred",
        ),
        pytest.param({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}}, "topk", id="topk_by_activation"),
        pytest.param({"architecture": "jumprelu"}, "jumprelu", id="jumprelu"),
        pytest.param({"architecture": "gated"}, "gated", id="gated"),
    ],
)
def test_saelens_before_version_6(tmp_path: Path, changes: dict[str, Any], architecture: str) -> None:
    tensors = saelens_tensors(architecture)
    written = tensors | {"scaling_factor": np.ones(48, np.float32)}
    coder = _load(write_saelens(tmp_path, written, **OLD | changes))
    features = equation(architecture, tensors, ROWS.astype(np.float64) - tensors["b_dec"])
    expect(coder, features, features @ tensors["W_dec"] + tensors["b_dec"])
    assert coder.identity.site == "resid_pre.3"


CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


@pytest.mark.parametrize(
    ("model", "hook", "is_centred"),
    [
        pytest.param("gpt2-small", "blocks.3.hook_resid_pre", True, id="layer_norm"),
        pytest.param("EleutherAI/pythia-70m-deduped", "blocks.3.hook_mlp_out", True, id="pythia"),
        pytest.param("gpt2-small", "blocks.3.attn.hook_z", False, id="not_written"),
        pytest.param("gemma-2b", "blocks.3.hook_resid_pre", False, id="rms_norm"),
        pytest.param("meta-llama/Llama-3.1-8B", "blocks.3.hook_resid_pre", False, id="llama"),
    ],
)
def test_saelens_of_a_centred_model(tmp_path: Path, model: str, hook: str, is_centred: bool) -> None:
    tensors = plain_tensors()
    metadata = CENTRED | {"model_name": model, "hook_name": hook}
    coder = _load(write_saelens(tmp_path, tensors, metadata=metadata))
    x = ROWS.astype(np.float64)
    mean = x.mean(1, keepdims=True) * is_centred
    features = equation("standard", tensors, x - mean - tensors["b_dec"])
    expect(coder, features, features @ tensors["W_dec"] + tensors["b_dec"] + mean)
    assert ("centred" in coder.identity.architecture) is is_centred


def test_scaled_features_are_refused(tmp_path: Path) -> None:
    scaled = plain_tensors() | {"scaling_factor": np.full(48, 1.5, np.float32)}
    with pytest.raises(InvalidInput, match="scaling_factor is not 1 everywhere"):
        _load(write_saelens(tmp_path, scaled, **OLD))


def test_sparsify(tmp_path: Path) -> None:
    folder, tensors = write_sparsify(tmp_path)
    coder = _load(folder)
    t = {name: array.astype(np.float64) for name, array in tensors.items()}
    features = top(relu((ROWS - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]), 5)
    expect(coder, features, features @ t["W_dec"] + t["b_dec"])
    assert (coder.identity.site, coder.identity.architecture) == ("resid_post.3", "topk k=5 x-b_dec")


def test_gemma_scope_2(tmp_path: Path) -> None:
    tensors = random_arrays()
    coder = _load(write_gemma_scope_2(tmp_path, tensors))
    t = {name: array.astype(np.float64) for name, array in tensors.items()}
    pre = ROWS @ t["W_enc"] + t["b_enc"]
    features = pre * (pre > t["threshold"])
    expect(coder, features, features @ t["W_dec"] + t["b_dec"])
    identity = coder.identity
    assert (identity.site, identity.architecture, identity.declared_l0) == ("resid_post.13", "jumprelu", 12.0)


@pytest.mark.parametrize("norms", [(8.5, 8.5), (8.5, 3.0)], ids=["one_norm", "two_norms"])
def test_llama_scope(tmp_path: Path, norms: tuple[float, float]) -> None:
    """Normalise the row, encode, weigh by the decoder's norms, and bring all back to raw units."""
    said = {"in": norms[0], "out": norms[1]}
    folder, tensors = write_llama_scope(tmp_path, dataset_average_activation_norm=said)
    coder = _load(folder)
    t = {name: array.astype(np.float64) for name, array in tensors.items()}
    s_in, s_out = (np.sqrt(10) / norm for norm in norms)
    pre = (ROWS * s_in) @ t["encoder.weight"].T + t["encoder.bias"]  # in normalised units
    decoder = t["decoder.weight"].T / s_out  # from normalised features to raw units
    raw = pre * np.linalg.norm(decoder, axis=1)
    fires = raw > 0.75
    expect(coder, raw * fires, (pre * fires) @ decoder + t["decoder.bias"] / s_out)
    np.testing.assert_allclose(np.linalg.norm(coder.w_dec, axis=1), 1, rtol=1e-5)
    assert coder.identity.site == "resid_post.15"
    assert coder.identity.architecture == f"jumprelu threshold=0.75 norm_in={norms[0]} norm_out={norms[1]}"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_widened_exactly(tmp_path: Path, dtype: Any) -> None:
    tensors = {name: array.astype(dtype) for name, array in plain_tensors().items()}
    coder = _load(write_saelens(tmp_path, tensors))
    assert coder.w_enc.dtype == np.float32
    np.testing.assert_array_equal(coder.w_enc, tensors["W_enc"].astype(np.float32))


def test_sizes_need_no_weights(tmp_path: Path) -> None:
    for folder in (write_sparsify(tmp_path)[0], write_llama_scope(tmp_path)[0], write_gemma_scope_2(tmp_path)):
        sizes = sae_sizes(expand_sae_arguments([str(folder)])[0])
        assert (sizes.width, sizes.d_in) == (48, 10)


@given(
    st_numpy.arrays(np.float32, (4, 12), elements=st.integers(-2, 3).map(float)),
    st.integers(1, 12),
)
def test_of_equal_features_the_lower_index_wins(features: npt.NDArray[np.float32], k: int) -> None:
    positive = np.maximum(features, 0)
    found = keep_largest(torch.from_numpy(positive.copy()), k)
    np.testing.assert_array_equal(found.numpy(), top(positive.astype(np.float64), k))


def test_k_is_at_most_the_number_of_features(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="k is 49, of 48 features"):
        _load(write_saelens(tmp_path, plain_tensors(), architecture="topk", k=49))


def test_metadata_in_a_header_changes_nothing(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, plain_tensors())
    before = _load(folder)
    save_file(plain_tensors(), folder / "sae_weights.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(_load(folder).w_enc, before.w_enc)
