"""Whole extractions with a cross-layer transcoder, on a random Gemma 2 whose MLPs linear maps explain in part."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking_support import Truth
from corpus_support import metaspace_transformers
from layers_support import (
    N_LAYERS,
    Matrix,
    equation,
    features_of,
    write_layer,
)
from models_support import reference_sites, tiny_model
from saes_support import Arrays

import actstore
from actstore.errors import Unhealthy
from actstore.health import HealthCheck
from actstore.store import StoreReader

HIDDEN = 24
WORDS = ("the", "cat", "on", "a", "hat", "then", "not", "that", "boat", "tea", "ace", "each", "coat", "note")


@cache
def random_model() -> Any:
    return tiny_model(3, vocab_size=len(metaspace_transformers()), sliding_window=64)


@cache
def truth_rows() -> dict[str, Matrix]:
    tokens = torch.randint(4, random_model().config.vocab_size, (100, 30), generator=torch.Generator().manual_seed(9))
    found = reference_sites(random_model(), tokens, torch.ones_like(tokens))
    return {name: values.flatten(0, 1).double().numpy() for name, values in found.items()}


def fitted_layers() -> list[Arrays]:
    """Return a CLT: each layer passes its input on, and all up to a layer decode it together by least squares."""
    basis = np.concatenate([np.eye(HIDDEN), -np.eye(HIDDEN)])
    inputs = [truth_rows()[f"ln2.{layer}"] for layer in range(N_LAYERS)]
    decoders = np.zeros((N_LAYERS, len(basis), N_LAYERS, HIDDEN))
    biases = []
    for layer in range(N_LAYERS):
        known = np.concatenate([*inputs[: layer + 1], np.ones((len(inputs[0]), 1))], axis=1)
        solution = np.linalg.lstsq(known, truth_rows()[f"mlp_out.{layer}"], rcond=None)[0]
        for position in range(layer + 1):
            decoders[position, :, layer] = basis @ solution[position * HIDDEN : (position + 1) * HIDDEN]
        biases.append(solution[-1])
    return [
        {
            "w_enc": np.ascontiguousarray(basis.T, dtype=np.float32),
            "w_dec": decoders[layer].astype(np.float32),
            "b_enc": np.zeros(len(basis), np.float32),
            "b_dec": biases[layer].astype(np.float32),
            "threshold": np.full(len(basis), 1e-3, np.float32),
        }
        for layer in range(N_LAYERS)
    ]


def extract(out: Path, sae: Path, **options: Any) -> Truth:
    random = np.random.default_rng(4)
    texts = [" ".join(random.choice(WORDS, size=random.integers(5, 12))) for _ in range(60)]
    fixed = {"dtype": "float32", "device": "cpu", "context": 24, "shard_rows": 1024, "batch_tokens": 512}
    model, tokenizer = random_model(), metaspace_transformers()
    actstore.extract(
        model, texts, out=out, tokenizer=tokenizer, saes=[str(sae)], activation_bits=23, **fixed, **options
    )
    return Truth(StoreReader(out))


def health(truth: Truth, name: str) -> dict[str, HealthCheck]:
    (made,) = truth.reader.passes.values()
    checks = [HealthCheck.from_json(dict(body)) for body in made.health]
    return {check.subject: check for check in checks if check.name == name}


def test_a_cross_layer_transcoder_is_extracted(tmp_path: Path) -> None:
    layers = fitted_layers()
    for layer, arrays in enumerate(layers):
        folder = write_layer(tmp_path / "tiny-scope-2", "clt/width_144_l0_small", layer, arrays)
    sites = [f"{kind}.{layer}" for layer in range(N_LAYERS) for kind in ("ln2", "mlp_out")]
    truth = extract(tmp_path / "clt.act", folder, sites=sites)
    names = [f"{layer}-tiny-scope-2-clt-width_144_l0_small" for layer in range(N_LAYERS)]
    inputs = [truth.matrix(f"sites/ln2.{layer}").astype(np.float64) for layer in range(N_LAYERS)]
    for layer, name in enumerate(names):
        l0, norm, error_norm = truth.matrix(f"reconstruction/{name}").T
        y = truth.matrix(f"sites/mlp_out.{layer}").astype(np.float64)
        np.testing.assert_array_equal(l0, (features_of(layers[layer], inputs[layer]) > 0).sum(1))
        np.testing.assert_allclose(norm, np.linalg.norm(y, axis=1), rtol=1e-5)
        errors = np.linalg.norm(y - equation(layers, inputs, layer), axis=1)
        assert np.isnan(error_norm).all() if layer else np.allclose(error_norm, errors, rtol=1e-3, atol=1e-4)
    found = health(truth, "sae_fvu")
    plain = np.flatnonzero(truth.plain)[:1024]
    for layer, name in enumerate(names):
        y = truth.matrix(f"sites/mlp_out.{layer}")[plain].astype(np.float64)
        residual = y - equation(layers, [rows[plain] for rows in inputs], layer)
        fvu = (residual**2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert found[name].ok and found[name].value == pytest.approx(fvu, rel=1e-3 if layer else 0.2)
        assert fvu < 0.95
    store = actstore.open(tmp_path / "clt.act")
    counted = store.sql("SELECT sae, count(error_norm) c FROM reconstruction GROUP BY sae ORDER BY sae").arrow()
    assert [n > 0 for n in counted["c"].to_pylist()] == [True, False, False]
    saes = store.sql("SELECT count(DISTINCT release) r, count(*) n FROM saes").arrow().to_pylist()
    assert saes == [{"r": 1, "n": N_LAYERS}]


def test_a_sum_that_explains_nothing_is_refused(tmp_path: Path) -> None:
    """Each file is sound, and layer 1 reads its rows rightly; what it is told to write is another tensor."""
    layers = fitted_layers()
    layers[1]["b_dec"] = layers[1]["b_dec"] * -20
    for layer, arrays in enumerate(layers):
        folder = write_layer(tmp_path, "clt/width_144_l0_small", layer, arrays)
    with pytest.raises(Unhealthy, match=r"sae_fvu of 1-.*, expected at most 1, summed over layers 0 to 1"):
        extract(tmp_path / "clt.act", folder)


def test_one_layer_alone_is_extracted_without_a_proof(tmp_path: Path) -> None:
    folder = write_layer(tmp_path, "clt/width_144_l0_small", 2, fitted_layers()[2])
    truth = extract(tmp_path / "one.act", folder)
    (check,) = health(truth, "sae_fvu").values()
    assert check.ok is None and "number 0 was not asked for" in check.expected
    assert health(truth, "sae_site") == {}
