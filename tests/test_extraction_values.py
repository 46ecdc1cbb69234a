"""What is stored is what transformers computes: sites, predictions, lenses and firings, each by independent code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking_support import (
    ATT,
    BATCH_TOKENS,
    LENS_SITES,
    MODEL,
    RES,
    SAE_SITES,
    SITES,
    SmallStore,
    Truth,
    reference_model,
    request_of,
)
from corpus_support import metaspace_transformers
from extraction_support import batches_of, log_softmax, next_tokens, run_batches
from models_support import save_tiny_model

import actstore
from actstore.store import StoreReader

STORED = [*(site for site in SITES if "*" not in site), *LENS_SITES]
# One sequence at a time the matrix products have other shapes; measured: 5e-6 of the largest value.
ALONE_TOLERANCE = 2e-5
BFLOAT16_TOLERANCE = 0.06  # bfloat16 keeps 8 bits; random weights multiply its rounding over three layers


@pytest.fixture(scope="module")
def reference(small: SmallStore) -> dict[str, np.ndarray]:
    return run_batches(reference_model(), small.truth, batches_of(small.truth, BATCH_TOKENS), STORED)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("site", STORED)
def test_a_site_is_what_transformers_computes(small: SmallStore, reference: dict[str, np.ndarray], site: str) -> None:
    np.testing.assert_array_equal(small.truth.matrix(f"sites/{site}"), reference[site])


def test_alone_a_sequence_gives_the_same_within_rounding(small: SmallStore) -> None:
    truth = small.truth
    chosen = [[seq] for seq in range(0, len(truth.sequences), 7)]
    alone = run_batches(reference_model(), truth, chosen, STORED)
    rows = np.concatenate([truth.sequences[seq, 1] + np.arange(truth.sequences[seq, 2]) for (seq,) in chosen])
    places = truth.places(rows)
    for site in STORED:
        assert relative(truth.matrix(f"sites/{site}")[places], alone[site][places]) < ALONE_TOLERANCE, site


def test_the_last_residual_stream_is_before_the_final_norm(small: SmallStore, reference: dict[str, np.ndarray]) -> None:
    last, final = small.truth.matrix("sites/resid_post.5"), small.truth.matrix("sites/final")
    assert relative(last, final) > 0.1
    gain = 1 + reference_model().model.norm.weight.detach().numpy()
    normed = last / np.sqrt((last.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6) * gain
    np.testing.assert_allclose(normed, reference["final"], rtol=1e-4, atol=1e-5)


def odd_model_store(folder: Path, **options: Any) -> tuple[Path, Truth]:
    """Extract a random model in which no two widths agree: 6 heads in 3 groups, windows of 4 tokens."""
    texts = ["the cat on the cat " * 5, "at the", "cat", "on cat on the at the cat on", "the🙂cat"]
    path = save_tiny_model(folder / "odd-model", seed=3, vocab_size=290)
    sites = ["resid_pre.*", "resid_mid.*", "resid_post.*", "attn_out.*", "mlp_out.*", "z.*", "final"]
    out = folder / "odd.act"
    options = {"dtype": "float32", "context": 24, "shard_rows": 64, "batch_tokens": 60, "lens_k": 3} | options
    actstore.extract(path, texts, out=out, tokenizer=metaspace_transformers(), sites=sites, device="cpu", **options)
    return path, Truth(StoreReader(out))


def test_a_model_of_odd_sizes_is_captured_exactly(tmp_path: Path) -> None:
    path, truth = odd_model_store(tmp_path)
    sites = sorted(path.removeprefix("sites/") for path in truth.reader.layout.artifacts if path.startswith("sites/"))
    assert len(sites) == 6 * 3 + 1
    expected = run_batches(reference_model(path=path), truth, batches_of(truth, 60), sites)
    for site in sites:
        np.testing.assert_array_equal(truth.matrix(f"sites/{site}"), expected[site], err_msg=site)
    assert truth.matrix("sites/z.1").shape[1] == 60  # 6 heads of 10, not d_model
    assert truth.sequences[:, 2].max() > 4  # longer than the sliding window


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_bfloat16_is_captured_as_the_model_computes_it(tmp_path: Path, storage: str) -> None:
    path, truth = odd_model_store(tmp_path, dtype="bfloat16", storage_dtype=storage)
    batches, sites = batches_of(truth, 60), ["resid_post.1", "z.2"]
    expected = run_batches(reference_model(torch.bfloat16, path), truth, batches, sites)
    exact = run_batches(reference_model(path=path), truth, batches, sites)
    for site in sites:
        stored = truth.matrix(f"sites/{site}").astype(np.float32)
        np.testing.assert_array_equal(stored, expected[site])
        assert 0 < relative(stored, exact[site]) < BFLOAT16_TOLERANCE
    assert str(truth.matrix("sites/z.2").dtype) == storage


def test_predictions_are_the_models_own(small: SmallStore, reference: dict[str, np.ndarray]) -> None:
    truth = small.truth
    values, ids = truth.matrix("predictions/values"), truth.matrix("predictions/ids")
    logprobs, targets = log_softmax(reference["logits"]), next_tokens(truth)
    np.testing.assert_array_equal(ids[:, 0], targets)
    np.testing.assert_array_equal(ids[:, 1], logprobs.argmax(1))
    has_target = targets >= 0
    chosen = logprobs[np.flatnonzero(has_target), targets[has_target]]
    np.testing.assert_allclose(values[has_target, 0], chosen, rtol=1e-4, atol=1e-4)
    assert np.isnan(values[~has_target, 0]).all()
    np.testing.assert_allclose(values[:, 1], -(np.exp(logprobs) * logprobs).sum(1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(values[:, 2], np.exp(logprobs.max(1)), rtol=1e-4)
    with small.open() as store:
        nulls = store.sql("SELECT row FROM predictions WHERE target_id IS NULL AND target_logprob IS NULL ORDER BY row")
    assert nulls.numpy()["row"].tolist() == truth.rows[~has_target].tolist()


@pytest.mark.parametrize("site", ["resid_post.0", "resid_post.3", "resid_post.5"])
def test_a_lens_is_final_norm_unembedding_and_cap(
    small: SmallStore, reference: dict[str, np.ndarray], site: str
) -> None:
    truth, model = small.truth, reference_model()
    with torch.no_grad():
        normed = model.model.norm(torch.from_numpy(reference[site]))
        logits = 30 * torch.tanh(model.lm_head(normed) / 30)
    logprobs, final, targets = log_softmax(logits.numpy()), log_softmax(reference["logits"]), next_tokens(truth)
    values, ids = truth.matrix(f"lens/logit/{site}/values"), truth.matrix(f"lens/logit/{site}/ids")
    ordered = -np.sort(-logprobs, axis=1)
    np.testing.assert_allclose(values[:, 3:], ordered[:, :5], rtol=1e-4, atol=2e-4)
    picked = np.take_along_axis(logprobs, ids[:, 1:].astype(np.int64), 1)
    np.testing.assert_allclose(picked, ordered[:, :5], rtol=1e-4, atol=2e-4)
    rows = np.flatnonzero(targets >= 0)
    target = logprobs[rows, targets[rows]]
    np.testing.assert_allclose(values[rows, 0], target, rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(values[:, 1], -(np.exp(logprobs) * logprobs).sum(1), rtol=1e-3, atol=1e-3)
    divergence = (np.exp(final) * (final - logprobs)).sum(1)
    np.testing.assert_allclose(values[:, 2], divergence, rtol=1e-3, atol=1e-3)
    # A rank may differ by those whose logits differ from the target's by rounding alone.
    near = (np.abs(logprobs[rows] - target[:, None]) < 1e-4).sum(1)
    rank = (logprobs[rows] > target[:, None]).sum(1) + 1
    assert (np.abs(ids[rows, 0] - rank) <= near).all()
    assert (ids[targets < 0, 0] == -1).all() and np.isnan(values[targets < 0, 0]).all()


def test_the_last_sites_lens_is_the_prediction(small: SmallStore) -> None:
    truth = small.truth
    lens, own = truth.matrix("lens/logit/resid_post.5/values"), truth.matrix("predictions/values")
    np.testing.assert_array_equal(lens[:, :2], own[:, :2])
    np.testing.assert_array_equal(lens[:, 2], 0.0)
    likeliest = truth.matrix("lens/logit/resid_post.5/ids")[:, 1]
    np.testing.assert_array_equal(likeliest, truth.matrix("predictions/ids")[:, 1])


def jump_relu(small: SmallStore, sae: str) -> tuple[np.ndarray, np.ndarray]:
    """Return pre-activations and activations of every row in use: facts §1.3 in float64."""
    arrays, rows = small.saes[sae], small.truth.matrix(f"sites/{SAE_SITES[sae]}").astype(np.float64)
    before = rows @ arrays["W_enc"].astype(np.float64) + arrays["b_enc"]
    return before, np.where(before > arrays["threshold"], before, 0.0)


@pytest.mark.parametrize("sae", [RES, ATT])
def test_firings_are_jump_relu_of_the_raw_rows(small: SmallStore, sae: str) -> None:
    truth, threshold = small.truth, small.saes[sae]["threshold"]
    before, dense = jump_relu(small, sae)
    firings = truth.firings(sae)
    stored = np.zeros_like(dense)
    stored[truth.places(firings.row), firings.feature] = firings.activation
    special = truth.field("flags") & 1 == 1
    assert not stored[special].any()
    near = np.abs(before - threshold) < 1e-4 * np.abs(threshold)
    expected = np.where(special[:, None], 0.0, dense)
    np.testing.assert_array_equal((stored > 0)[~near], (expected > 0)[~near])
    both = (stored > 0) & (expected > 0)
    assert both.sum() > 10_000
    # ten bits of mantissa: half a unit of the last one, and the rounding of the product
    np.testing.assert_allclose(stored[both], expected[both], rtol=2**-11 + 1e-4)
    assert (firings.activation.view(np.uint32) & 0x1FFF == 0).all()


@pytest.mark.parametrize("sae", [RES, ATT])
def test_reconstruction_counts_special_rows_too(small: SmallStore, sae: str) -> None:
    truth, arrays = small.truth, small.saes[sae]
    before, dense = jump_relu(small, sae)
    rows = truth.matrix(f"sites/{SAE_SITES[sae]}").astype(np.float64)
    stored = truth.matrix(f"reconstruction/{sae}")
    error = rows - (dense @ arrays["W_dec"].astype(np.float64) + arrays["b_dec"])
    special = truth.field("flags") & 1 == 1
    assert stored[special, 0].min() > 0
    np.testing.assert_allclose(stored[:, 1], np.linalg.norm(rows, axis=1), rtol=1e-5)
    # A threshold is the activation of some row: there float32 and float64 may disagree about firing.
    certain = (np.abs(before - arrays["threshold"]) > 1e-4 * np.abs(arrays["threshold"])).all(1)
    np.testing.assert_array_equal(stored[certain, 0], (dense > 0).sum(1)[certain])
    assert certain.mean() > 0.5
    np.testing.assert_allclose(stored[certain, 2], np.linalg.norm(error, axis=1)[certain], rtol=1e-4)


def test_encode_special_lists_them_and_changes_nothing_else(small: SmallStore, tmp_path: Path) -> None:
    options = request_of(small.sae_folders) | {"encode_special": True, "sites": [], "lens_k": 0}
    actstore.extract(MODEL, small.documents, out=tmp_path / "all.act", **options)
    with_special, without = Truth(StoreReader(tmp_path / "all.act")), small.truth
    found, expected = with_special.firings(RES), without.firings(RES)
    special = with_special.field("flags")[with_special.places(found.row)] & 1 == 1
    np.testing.assert_array_equal(found.row[~special], expected.row)
    np.testing.assert_array_equal(found.activation[~special], expected.activation)
    l0 = with_special.matrix(f"reconstruction/{RES}")[:, 0]
    counts = np.bincount(with_special.places(found.row), minlength=len(l0))
    np.testing.assert_array_equal(counts, l0)  # now every counted firing is listed
    with actstore.open(tmp_path / "all.act") as store, small.open() as plain:
        question = f"SELECT feature, n_firings, density FROM features WHERE sae = '{RES}' ORDER BY feature"
        assert store.sql(question).rows() == plain.sql(question).rows()  # statistics are over plain rows all the same


@pytest.mark.parametrize("sae", [RES, ATT])
def test_feature_logits_are_decoder_times_gain_times_unembedding(small: SmallStore, sae: str) -> None:
    model = reference_model()
    directions = small.saes[sae]["W_dec"].astype(np.float64)
    if sae == ATT:  # z goes through W_O, then the gain of the norm behind it
        attention, norm = model.model.layers[2].self_attn, model.model.layers[2].post_attention_layernorm
        directions = directions @ attention.o_proj.weight.detach().double().numpy().T
        directions = directions * (1 + norm.weight.detach().double().numpy())
    gain = 1 + model.model.norm.weight.detach().double().numpy()
    logits = directions * gain @ model.lm_head.weight.detach().double().numpy().T
    logits -= logits.mean(1, keepdims=True)
    stored = small.truth.reader.feature_logits(sae)
    assert stored is not None
    token_ids, values = stored
    expected = np.concatenate([-np.sort(-logits, axis=1)[:, :10], np.sort(logits, axis=1)[:, :10]], axis=1)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    picked = np.take_along_axis(logits, token_ids.astype(np.int64), 1)
    np.testing.assert_allclose(picked, expected, rtol=1e-4, atol=1e-5)
