"""Whole extractions with transcoders, on a random Gemma 2 whose MLP a linear map explains in part."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from asking_support import Truth
from corpus_support import metaspace_transformers
from models_support import reference_sites, tiny_model
from saes_support import (
    Arrays,
    write_safetensors,
)
from transcoder_support import (
    SECOND,
    doubles,
    jump,
    unnamed,
)

import actstore
from actstore.errors import InvalidInput, Unhealthy, UnknownName
from actstore.store import StoreReader

LAYER, SHARD_ROWS = 1, 1024
WORDS = ("the", "cat", "on", "a", "hat", "then", "not", "that", "boat", "tea", "ace", "each", "coat", "note")


@cache
def texts() -> list[str]:
    random = np.random.default_rng(4)
    return [" ".join(random.choice(WORDS, size=random.integers(5, 12))) for _ in range(60)]


@cache
def random_model() -> Any:
    """Return a model whose norm before the MLP has gains that nobody can overlook."""
    model = tiny_model(3, vocab_size=len(metaspace_transformers()), sliding_window=64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.pre_feedforward_layernorm.weight.copy_(torch.linspace(-1.9, 3, 24))
    return model


@cache
def truth_rows() -> dict[str, npt.NDArray[np.float64]]:
    """Return sites of the random model over random tokens: (row, width)."""
    model = random_model()
    tokens = torch.randint(4, model.config.vocab_size, (100, 30), generator=torch.Generator().manual_seed(9))
    found = reference_sites(model, tokens, torch.ones_like(tokens))
    return {name: values.flatten(0, 1).double().numpy() for name, values in found.items()}


def linear(read: str, write: str) -> Arrays:
    """Return a transcoder of JumpReLU features that passes its input on, and decodes it by least squares."""
    x, y = truth_rows()[read], truth_rows()[write]
    with_one = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    solution = np.linalg.lstsq(with_one, y, rcond=None)[0]
    basis = np.concatenate([np.eye(x.shape[1]), -np.eye(x.shape[1])])
    arrays = {
        "W_enc": basis.T,
        "W_dec": basis @ solution[:-1],
        "b_enc": np.zeros(len(basis)),
        "b_dec": solution[-1],
        "threshold": np.full(len(basis), 1e-3),
    }
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}


def extract(out: Path, model: Path, saes: list[str], **options: Any) -> Truth:
    fixed = {"dtype": "float32", "device": "cpu", "context": 24, "shard_rows": SHARD_ROWS, "batch_tokens": 512}
    actstore.extract(
        model, texts(), out=out, tokenizer=metaspace_transformers(), saes=saes, activation_bits=23, **(fixed | options)
    )
    return Truth(StoreReader(out))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    random_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a transcoder named as Gemma Scope's, of the norm without its gain."""
    folder = tmp_path_factory.mktemp("right") / f"tiny-scope-transcoders/layer_{LAYER}/width_48/average_l0_20"
    return str(unnamed(folder, linear(f"ln2_normalized.{LAYER}", f"mlp_out.{LAYER}")))


SAE = f"{LAYER}-tiny-scope-transcoders-48__l0-20"
SITES = [f"ln2_normalized.{LAYER}", f"mlp_out.{LAYER}"]


def test_a_transcoder_is_extracted(tmp_path: Path, model: Path, right: str) -> None:
    """The reconstruction is of the site that is written; and two passes make what one pass makes."""
    truth = extract(tmp_path / "one.act", model, [right], sites=SITES)
    x, y = (truth.matrix(f"sites/{site}").astype(np.float64) for site in SITES)
    a = doubles(linear(*SITES))
    f = jump(x @ a["W_enc"], a["threshold"])
    l0, norm, error_norm = truth.matrix(f"reconstruction/{SAE}").T
    np.testing.assert_array_equal(l0, (f > 0).sum(1))
    np.testing.assert_allclose(norm, np.linalg.norm(y, axis=1), rtol=1e-5)
    np.testing.assert_allclose(error_norm, np.linalg.norm(y - f @ a["W_dec"] - a["b_dec"], axis=1), rtol=1e-4)
    extract(tmp_path / "two.act", model, [], sites=SITES)
    again = extract(tmp_path / "two.act", model, [right], into=True, predictions=False)
    np.testing.assert_array_equal(again.matrix(f"reconstruction/{SAE}"), truth.matrix(f"reconstruction/{SAE}"))
    one, two = truth.firings(SAE), again.firings(SAE)
    np.testing.assert_array_equal(one.feature, two.feature)
    np.testing.assert_array_equal(one.activation, two.activation)
    store = actstore.open(tmp_path / "one.act")
    (sae,) = store.sql("SELECT site, write_site, width FROM saes").arrow().to_pylist()
    assert sae == {"site": SITES[0], "write_site": SITES[1], "width": 48}
    proofs = store.sql("SELECT ok FROM health WHERE name = 'sae_site'").arrow()["ok"].to_pylist()
    assert len(proofs) > 40 and all(proofs)
    top = store.sql("SELECT token_id, logit FROM feature_logits WHERE feature = 3 AND rank = 1 ORDER BY logit DESC")
    assert len(top.arrow()) > 0


@pytest.mark.parametrize(
    ("fitted", "declared", "named"),
    [
        pytest.param(("ln2_normalized", "mlp_out"), "ln2.1>mlp_out.1", "reading ln2_normalized.1", id="with_the_gain"),
        pytest.param(("ln2", "mlp_out"), "ln2_normalized.1>mlp_out.1", "reading ln2.1", id="without_the_gain"),
        pytest.param(("ln2_normalized", "mlp_out"), "resid_mid.1>mlp_out.1", "reading ln2_normalized.1", id="before"),
        pytest.param(
            ("ln2_normalized", "mlp_out"), "ln2_normalized.1>mlp_out_raw.1", "writing mlp_out.1", id="before_post_norm"
        ),
        pytest.param(
            ("ln2_normalized", "mlp_out_raw"),
            "ln2_normalized.1>mlp_out.1",
            "writing mlp_out_raw.1",
            id="after_post_norm",
        ),
        pytest.param(
            ("ln2_normalized", "mlp_out"),
            "ln2_normalized.0>mlp_out.0",
            "reading ln2_normalized.1 and writing mlp_out.1",
            id="a_layer_too_low",
        ),
    ],
)
def test_a_wrong_site_is_refused_and_the_right_one_named(
    tmp_path: Path, model: Path, fitted: tuple[str, str], declared: str, named: str
) -> None:
    folder = unnamed(tmp_path / "tc", linear(*(f"{kind}.{LAYER}" for kind in fitted)))
    with pytest.raises(Unhealthy, match=rf"{named} explains it better"):
        extract(tmp_path / "out.act", model, [f"tc={folder}@{declared}"])


def test_a_skip_that_is_transposed_explains_nothing(tmp_path: Path, model: Path) -> None:
    """Where both sites are of one width no shape tells; the proof does."""
    arrays = linear(f"ln2.{LAYER}", f"mlp_out.{LAYER}")
    width = arrays["b_dec"].size
    tensors = {name.lower(): array for name, array in arrays.items()}
    tensors["w_dec"] = np.zeros_like(tensors["w_dec"])
    for name, skip in {"right": arrays["W_dec"][:width], "turned": arrays["W_dec"][:width].T}.items():
        body = SECOND | {key: value.replace("13", "1") for key, value in SECOND.items() if "hook" in key}
        tensors["affine_skip_connection"] = skip
        folder = write_safetensors(tmp_path / name, "params.safetensors", tensors, "config.json", body)
        if name == "right":
            extract(tmp_path / "right.act", model, [str(folder)])
        else:
            with pytest.raises(Unhealthy, match=r"sae_fvu of .* expected at most 1"):
                extract(tmp_path / "turned.act", model, [str(folder)])


def test_both_sites_must_be_on_the_model(tmp_path: Path, model: Path) -> None:
    folder = unnamed(tmp_path / "tc", linear(f"ln2.{LAYER}", f"mlp_out.{LAYER}"))
    with pytest.raises(UnknownName, match=r"no site 'mlp_out\.7'"):
        extract(tmp_path / "out.act", model, [f"{folder}@ln2.1>mlp_out.7"])
    with pytest.raises(InvalidInput, match=r"writes vectors of width 24, and the site z\.1 of this model has width 60"):
        extract(tmp_path / "out.act", model, [f"{folder}@ln2.1>z.1"])
    assert not (tmp_path / "out.act").exists()


def test_the_embedding_is_read_unscaled(tmp_path: Path, model: Path) -> None:
    """A feature for each token, which fires on its own row and hardly on another; Gemma scales what its layers see."""
    embedding = random_model().model.embed_tokens.weight.detach().double().numpy()
    norm = np.linalg.norm(embedding, axis=1)
    w_dec = embedding / norm[:, None]
    arrays = {"W_enc": w_dec.T, "W_dec": w_dec, "b_enc": norm * 0, "b_dec": embedding[0] * 0, "threshold": norm * 0.9}
    arrays = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
    release = tmp_path / "tiny-scope-res" / f"embedding/width_{len(norm)}/average_l0_1"
    extract(tmp_path / "right.act", model, [str(unnamed(release, arrays))])
    other = unnamed(tmp_path / "other", arrays)
    with pytest.raises(Unhealthy, match="embed_raw explains it better"):
        extract(tmp_path / "wrong.act", model, [f"{other}@resid_pre.0"])
