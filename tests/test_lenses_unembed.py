"""The lens without torch equals the model's own logits, a block of the vocabulary at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from asking_support import SmallStore, reference_model
from extraction_support import log_softmax

from actstore.errors import InvalidInput, UnsupportedFormat
from actstore.lenses import Unembed, widened
from actstore.lenses import unembed as unembed_module
from actstore.lenses.widened import WidenedWeight
from actstore.store import write_piece
from actstore.store.bundle import open_bundle_file


class Piece(dict[str, Any]):
    """A kit piece in memory: arrays by name, and attributes."""

    def __init__(self, weight: Any, gain: np.ndarray, softcap: float | None = 30.0, norm: str = "rms") -> None:
        super().__init__(weight=weight if isinstance(weight, WatchedArray) else WatchedArray(weight), gain=gain)
        self.attrs = {"softcap": softcap, "norm_epsilon": 1e-6, "norm": norm}


def made(weight: Any, gain: np.ndarray, **attributes: Any) -> Unembed:
    return Unembed(Piece(weight, gain, **attributes))  # type: ignore[arg-type]


class WatchedArray:
    """Stands for an array on the disk, in chunks of so many tokens, that is too large to be read whole."""

    def __init__(self, values: np.ndarray, chunk: int = 1) -> None:
        self.values, self.reads = values, list[tuple[int, int]]()
        self.shape, self.dtype, self.chunks = values.shape, values.dtype, (chunk, values.shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        assert isinstance(rows, slice) and rows.start is not None
        taken = self.values[rows]
        self.reads.append((rows.start, len(taken)))
        return taken

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise AssertionError("the whole unembedding was read")


def torch_lens(rows: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the model's log-probabilities of last residual rows: its own norm, head and cap."""
    model = reference_model(dtype)
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(torch.from_numpy(rows).to(dtype))).float()
    return log_softmax((30 * torch.tanh(logits / 30)).numpy())


@pytest.fixture
def piece(small: SmallStore) -> Any:
    reader = small.truth.reader
    return reader.kit_piece(reader.kit_digest("unembedding", "sites/resid_post.1"))


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
@pytest.mark.parametrize("tokens_per_block", [100, 1663, 1664, 8192])
@pytest.mark.parametrize("k", [1, 7, 1664])
def test_the_last_layers_lens_is_the_models_prediction(
    small: SmallStore, piece: Any, monkeypatch: pytest.MonkeyPatch, tokens_per_block: int, k: int, kept_bytes: int
) -> None:
    monkeypatch.setattr(widened, "TOKENS_PER_BLOCK", tokens_per_block)
    monkeypatch.setattr(widened, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(unembed_module, "ROWS_PER_BLOCK", 30)
    rows = small.truth.matrix("sites/resid_post.5")[:100]
    top = Unembed(piece).top(rows, k)
    expected = torch_lens(rows, torch.float32)
    ordered = -np.sort(-expected, axis=1)[:, :k]
    np.testing.assert_allclose(top.logprobs, ordered, rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(
        np.take_along_axis(expected, top.token_ids.astype(np.int64), 1), ordered, rtol=1e-4, atol=2e-4
    )
    assert (str(top.token_ids.dtype), str(top.logprobs.dtype)) == ("int32", "float32")
    assert all(len(set(ids)) == k for ids in top.token_ids.tolist())


def test_it_agrees_with_what_the_model_stored_at_extraction(small: SmallStore, piece: Any) -> None:
    truth = small.truth
    top = Unembed(piece).top(truth.matrix("sites/resid_post.5"), 1)
    np.testing.assert_allclose(np.exp(top.logprobs[:, 0]), truth.matrix("predictions/values")[:, 2], rtol=1e-4)


def test_a_bfloat16_kit_rounds_as_the_model_does(small: SmallStore) -> None:
    rows = small.truth.matrix("sites/resid_post.5")[:64].astype(ml_dtypes.bfloat16)
    model = reference_model(torch.bfloat16)
    weight = model.lm_head.weight.detach().float().numpy().astype(ml_dtypes.bfloat16)
    gain = 1 + model.model.norm.weight.detach().float().numpy()
    with torch.no_grad():  # the model would round its logits to 8 bits; here they stay as the sum gives them
        normed = model.model.norm(torch.from_numpy(rows.astype(np.float32)).bfloat16()).float()
        exact = normed @ model.lm_head.weight.float().T
    expected = log_softmax((30 * torch.tanh(exact / 30)).numpy())
    top = made(weight, gain).top(rows, 5)
    np.testing.assert_allclose(top.logprobs, -np.sort(-expected, axis=1)[:, :5], atol=1e-4)


def test_without_a_cap_logits_are_not_bent() -> None:
    random = np.random.default_rng(0)
    weight, rows = random.normal(size=(50, 8)).astype(np.float32) * 20, random.normal(size=(6, 8)).astype(np.float32)
    normed = rows / np.sqrt((rows.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6)
    for softcap, bent in ((None, normed @ weight.T), (5.0, 5 * np.tanh(normed @ weight.T / 5))):
        top = made(weight, np.ones(8, np.float32), softcap=softcap).top(rows, 50)
        np.testing.assert_allclose(np.sort(top.logprobs), np.sort(log_softmax(bent)), rtol=1e-3, atol=1e-3)


def test_equal_logits_go_by_token_id() -> None:
    weight = np.ones((40, 4), np.float32)
    assert (
        made(weight, np.ones(4, np.float32)).top(np.ones((2, 4), np.float32), 40).token_ids.tolist()
        == [[*range(40)]] * 2
    )


@pytest.mark.parametrize("k", [1, 3, 5, 16])
@pytest.mark.parametrize("tokens_per_block", [1, 7, 64])
def test_ties_go_to_the_lower_token_wherever_a_block_ends(
    monkeypatch: pytest.MonkeyPatch, k: int, tokens_per_block: int
) -> None:
    monkeypatch.setattr(widened, "TOKENS_PER_BLOCK", tokens_per_block)
    random = np.random.default_rng(k)
    weight = random.integers(-1, 2, size=(64, 4)).astype(ml_dtypes.bfloat16)
    rows = random.choice([-1, 1], size=(20, 4)).astype(np.float32)  # normed and rounded to bfloat16 they are the same
    logits = rows @ weight.astype(np.float32).T
    wanted = np.lexsort((np.broadcast_to(np.arange(64), logits.shape), -logits), axis=1)[:, :k]
    found = made(weight, np.ones(4, np.float32), softcap=None).top(rows, k)
    assert all(len(set(line)) <= 9 for line in logits.tolist())
    np.testing.assert_array_equal(found.token_ids, wanted)


@pytest.mark.parametrize("tokens_per_block", [5, 1000])
def test_a_row_that_is_no_number_has_tokens_and_no_probabilities(
    monkeypatch: pytest.MonkeyPatch, tokens_per_block: int
) -> None:
    monkeypatch.setattr(widened, "TOKENS_PER_BLOCK", tokens_per_block)
    weight = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    rows = np.ones((3, 4), np.float32)
    rows[1, 2] = np.nan
    unembed = made(weight, np.ones(4, np.float32))
    top, alone = unembed.top(rows, 6), unembed.top(rows[:1], 6)
    assert np.isnan(top.logprobs[1]).all()
    assert sorted(set(top.token_ids[1].tolist())) == sorted(top.token_ids[1].tolist())
    for row in (0, 2):
        np.testing.assert_array_equal(top.token_ids[row], alone.token_ids[0])
        np.testing.assert_allclose(top.logprobs[row], alone.logprobs[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_large_unembedding_is_never_read_or_widened_whole(monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    monkeypatch.setattr(widened, "TOKENS_PER_BLOCK", 64)
    monkeypatch.setattr(widened, "KEPT_BYTES", 1000 * 6 * 4 - 1)
    weight = WatchedArray(np.random.default_rng(0).normal(size=(1000, 6)).astype(dtype))
    made(weight, np.ones(6, np.float32)).top(np.ones((3, 6), np.float32), 4)
    assert max(length for _, length in weight.reads) <= 64
    assert sum(length for _, length in weight.reads) == 1000


@pytest.mark.parametrize("chunk", [1, 7, 24, 25, 50, 64, 65, 999, 1000, 1001])
def test_blocks_are_whole_chunks_where_they_fit_and_bounded_in_bytes(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(widened, "BLOCK_BYTES", 64 * 6 * 4)
    monkeypatch.setattr(widened, "KEPT_BYTES", 0)
    weight = WatchedArray(np.zeros((1000, 6), np.float32), chunk)
    seen = [(first, len(block)) for first, block in WidenedWeight(weight)]
    assert seen == sorted(weight.reads)
    assert sum(length for _, length in seen) == 1000
    assert max(length for _, length in seen) <= 64
    assert chunk > 64 or all(first % chunk == 0 for first, _ in seen)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_every_bfloat16_is_widened_to_the_float32_that_it_is(monkeypatch: pytest.MonkeyPatch, kept_bytes: int) -> None:
    """All 65,536 of them: zeros, subnormals, infinities and every NaN."""
    monkeypatch.setattr(widened, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(widened, "TOKENS_PER_BLOCK", 500)
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 16)
    blocks = [block.copy() for _, block in WidenedWeight(WatchedArray(bits.view(ml_dtypes.bfloat16)))]
    np.testing.assert_array_equal(np.concatenate(blocks).view(np.uint32), bits.astype(np.uint32) << 16)


def test_a_small_unembedding_is_read_once() -> None:
    weight = WatchedArray(np.random.default_rng(0).normal(size=(1000, 6)).astype(np.float32))
    unembed = made(weight, np.ones(6, np.float32))
    first = unembed.top(np.ones((3, 6), np.float32), 4)
    np.testing.assert_array_equal(unembed.top(np.ones((3, 6), np.float32), 4).logprobs, first.logprobs)
    assert weight.reads == [(0, 1000)]


def test_a_chunk_that_is_damaged_is_an_error_of_the_one_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Damaged(WatchedArray):
        def __getitem__(self, rows: slice) -> np.ndarray:
            if rows.start >= 500:
                raise ValueError("checksum")
            return super().__getitem__(rows)

    monkeypatch.setattr(widened, "TOKENS_PER_BLOCK", 100)
    monkeypatch.setattr(widened, "KEPT_BYTES", 0)
    weight = Damaged(np.ones((1000, 6), np.float32))
    with pytest.raises(ValueError, match="checksum"):
        made(weight, np.ones(6, np.float32)).top(np.ones((3, 6), np.float32), 4)


def test_no_rows_have_an_answer_of_no_rows() -> None:
    top = made(np.ones((9, 4), np.float32), np.ones(4, np.float32)).top(np.empty((0, 4), np.float32), 3)
    assert top.token_ids.shape == top.logprobs.shape == (0, 3)


@pytest.mark.parametrize(("k", "accepted"), [(0, "1 to 9"), (-2, "1 to 9"), (10, "1 to 9")])
def test_a_k_that_cannot_be_is_refused(k: int, accepted: str) -> None:
    with pytest.raises(InvalidInput, match=f"k is {k}.*{accepted}"):
        made(np.ones((9, 4), np.float32), np.ones(4, np.float32)).top(np.ones((1, 4), np.float32), k)


@pytest.mark.parametrize("shape", [(2, 5), (4,)])
def test_rows_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"Accepted: \(row, 4\)"):
        made(np.ones((9, 4), np.float32), np.ones(4, np.float32)).top(np.ones(shape, np.float32), 1)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(UnsupportedFormat, match="'batch'"):
        made(np.ones((9, 4), np.float32), np.ones(4, np.float32), norm="batch")


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_norm_is_centred_and_has_its_bias(tmp_path: Path, has_bias: bool) -> None:
    random = np.random.default_rng(1)
    weight, gain, bias = (random.normal(size=size).astype(np.float32) for size in ((60, 8), (8,), (8,)))
    rows = random.normal(size=(5, 8)).astype(np.float32) + 3
    arrays = {"weight": (weight, ("token", "width")), "gain": (gain, ("width",))}
    arrays |= {"bias": (bias, ("width",))} if has_bias else {}
    attributes = {"piece": "unembedding", "norm": "layer", "norm_epsilon": 1e-5, "softcap": None}
    digest = write_piece(tmp_path, arrays, attributes)
    norm = torch.nn.LayerNorm(8, eps=1e-5, bias=has_bias)
    with torch.no_grad():
        norm.weight.copy_(torch.from_numpy(gain))
        if has_bias:
            norm.bias.copy_(torch.from_numpy(bias))
        expected = torch.log_softmax(norm(torch.from_numpy(rows)) @ torch.from_numpy(weight).T, -1).sort(
            descending=True
        )
    top = Unembed(open_bundle_file(tmp_path / "kit" / f"{digest}.zip")).top(rows, 60)
    np.testing.assert_allclose(top.logprobs, expected.values.numpy(), atol=1e-5)
    assert top.token_ids.tolist() == expected.indices.tolist()
