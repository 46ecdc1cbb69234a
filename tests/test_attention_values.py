"""What is stored of attention, against full patterns from transformers reduced by loops."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from asking_support import firing_arrays
from attention_support import (
    BATCH_TOKENS,
    CONTEXT,
    METRICS,
    MORE,
    TEXTS,
    case_model,
    expected_rows,
    extract,
    patterns,
    sequences,
    truth_of,
    words,
)
from saes_support import write_sae
from store_support import hashes

import actstore
from actstore.blocks import ATTENTION_VALUES
from actstore.errors import InvalidInput, UnknownName
from actstore.extraction import Request, plan_extraction
from actstore.extraction.attention import AttentionBatch, _heaviest
from actstore.maintenance import drop, verify

K = 3


def check_store(model: Any, path: Path, *, atol: float = 1e-6) -> None:
    """Compare arrays, `edges`, and the three tables with loops over full patterns of transformers."""
    truth = truth_of(path)
    full, found = patterns(model, truth), sequences(truth)
    with actstore.open(path) as store:
        for layer, of_sequences in full.items():
            weights, offsets, values = (
                truth.matrix(f"attention/{layer}/{name}") for name in ("weights", "offsets", "values")
            )
            assert weights.dtype == values.dtype == np.float32 and offsets.dtype == np.int32
            expected = [
                heads
                for (_, ids, flags), pattern in zip(found, of_sequences, strict=True)
                for heads in expected_rows(pattern, ids, flags, K)
            ]
            check_arrays(expected, weights, offsets, values, truth, atol)
            check_tables(store, layer, expected, truth)


def check_arrays(expected: list[Any], weights: Any, offsets: Any, values: Any, truth: Any, atol: float) -> None:
    positions = truth.field("pos")
    for place, heads in enumerate(expected):
        for head, row in enumerate(heads):
            n_edges = len(row["edges"])
            assert [(positions[place] - o) for o in offsets[place, head, :n_edges]] == [key for key, _ in row["edges"]]
            found = np.array([weight for _, weight in row["edges"]], np.float32)
            np.testing.assert_array_equal(weights[place, head, :n_edges], found)
            assert np.isnan(weights[place, head, n_edges:]).all() and (offsets[place, head, n_edges:] == -1).all()
    for number, name in enumerate(ATTENTION_VALUES):
        wanted = np.array([[row[name] for row in heads] for heads in expected])
        np.testing.assert_allclose(values[:, :, number], wanted, rtol=1e-5, atol=atol, err_msg=name)


def check_tables(store: Any, layer: int, expected: list[Any], truth: Any) -> None:
    listed = [
        (int(row), head, int(row) - int(pos) + key, np.float32(weight))
        for row, pos, heads in zip(truth.rows, truth.field("pos"), expected, strict=True)
        for head, of in enumerate(heads)
        for key, weight in of["edges"]
    ]
    query = f"SELECT row, head, key_row, weight FROM attention WHERE layer = {layer}"
    indexed = [tuple(one.values()) for one in store.sql(query).rows()]
    assert indexed == [edge for edge in listed if edge[3] >= np.float32(0.005)]
    text = f"SELECT row, edges({layer}, row) AS edges FROM tokens ORDER BY row"
    assert [(one["row"], *edge.values()) for one in store.sql(text).rows() for edge in one["edges"]] == listed
    rows = store.sql(f"SELECT * EXCLUDE (layer) FROM attention_rows WHERE layer = {layer} ORDER BY row, head").rows()
    kept = [(int(row), head) for row, heads in zip(truth.rows, expected, strict=True) for head in range(len(heads))]
    assert [(one["row"], one["head"]) for one in rows] == kept
    for name in ("kept_weight", "entropy"):
        wanted = [of[name] for heads in expected for of in heads]
        np.testing.assert_allclose([one[name] for one in rows], wanted, rtol=1e-5, atol=1e-5)
    means = store.sql(f"SELECT * EXCLUDE (layer) FROM heads WHERE layer = {layer} ORDER BY head").rows()
    plain = [heads for heads, is_plain in zip(expected, truth.plain, strict=True) if is_plain]
    for head, one in enumerate(means):
        assert one["head"] == head
        for name in METRICS:
            assert one[name] == pytest.approx(np.nanmean([heads[head][name] for heads in plain]), rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with grouped heads, soft caps and windows in half of its layers, and its store of attention alone."""
    model, path = case_model("gemma_2"), tmp_path_factory.mktemp("gemma") / "a.act"
    extract(model, path)
    return model, path


@pytest.fixture(scope="module")
def whole(gemma: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model's store of whole patterns, without the heaviest keys."""
    path = tmp_path_factory.mktemp("whole") / "a.act"
    extract(gemma[0], path, attention_top=0, sites=["pattern.*", "z.1"])
    return path


def copied(store: Path, folder: Path) -> Path:
    return Path(shutil.copytree(store, folder / "copy.act"))


def test_grouped_heads_soft_caps_and_windows_are_reduced_as_loops_do_it(gemma: tuple[Any, Path]) -> None:
    truth = truth_of(gemma[1])
    assert truth.reader.layout.n_shards > 2 and truth.field("flags")[0] == 1
    check_store(*gemma)


def test_parallel_blocks_are_reduced_as_loops_do_it(tmp_path: Path) -> None:
    model = case_model("pythia")
    extract(model, tmp_path / "a.act")
    check_store(model, tmp_path / "a.act")


def test_windows_that_overlap_are_sequences_of_their_own(tmp_path: Path) -> None:
    model = case_model("mistral")  # whose layers all slide
    extract(model, tmp_path / "a.act", stride=6)
    assert (truth_of(tmp_path / "a.act").field("flags") & 4).any()
    check_store(model, tmp_path / "a.act")


def test_equal_weights_keep_the_first_keys_and_no_bos_is_needed(tmp_path: Path) -> None:
    model = case_model("gpt_2")
    with torch.no_grad():  # layer 1 attends to all keys alike
        model.transformer.h[1].attn.c_attn.weight[:, :48].zero_()
        model.transformer.h[1].attn.c_attn.bias[:48].zero_()
    extract(model, tmp_path / "a.act", bos=False)
    truth = truth_of(tmp_path / "a.act")
    assert truth.field("flags")[0] == 0
    check_store(model, tmp_path / "a.act")
    keys = truth.field("pos")[:, None, None] - truth.matrix("attention/1/offsets")
    full = truth.field("pos") >= K - 1
    assert (keys[full] == np.arange(K)).all()


def test_bfloat16_is_reduced_as_it_was_computed_in_the_pass_that_stores_patterns_whole(tmp_path: Path) -> None:
    model = case_model("gemma_2", torch.bfloat16)
    extract(model, tmp_path / "a.act", sites=["pattern.*"])
    check_store(model, tmp_path / "a.act")
    check_patterns(model, tmp_path / "a.act")


def test_an_appended_segment_is_reduced_too(gemma: tuple[Any, Path], tmp_path: Path) -> None:
    path = copied(gemma[1], tmp_path)
    extract(gemma[0], path, append=MORE)
    assert len(truth_of(path).reader.segments()) == 2
    check_store(gemma[0], path)


def check_patterns(model: Any, path: Path) -> None:
    """Compare whole patterns with those of transformers: zero on other keys, NaN in filler."""
    truth = truth_of(path)
    for layer, of_sequences in patterns(model, truth).items():
        stored = truth.matrix(f"sites/pattern.{layer}").astype(np.float32).reshape(-1, 6, CONTEXT)
        for (first, ids, _), pattern in zip(sequences(truth), of_sequences, strict=True):
            place = truth.place[first]
            here = stored[place : place + len(ids)].transpose(1, 0, 2)
            np.testing.assert_array_equal(here[:, :, : len(ids)], pattern)
            assert not here[:, :, len(ids) :].any()
    array = truth.reader.array("sites/pattern.0")
    used = truth.reader.rows_used[0]
    assert np.isnan(np.asarray(array[int(used) : truth.reader.shard_rows]).astype(np.float32)).all()


def test_a_whole_pattern_is_stored_over_the_keys_of_a_window(gemma: tuple[Any, Path], whole: Path) -> None:
    check_patterns(gemma[0], whole)
    row = int(truth_of(whole).rows[5])
    with actstore.open(whole) as store:
        assert store.sites == ["pattern.0", "pattern.1", "z.1", "pattern.2"]
        assert store["pattern.1"].width == 6 * CONTEXT
        flat = store.sql("SELECT act('pattern.1', $row) AS vector", {"row": row}).rows()[0]["vector"]
        np.testing.assert_array_equal(np.array(flat), store["pattern.1"][row])


class Stopped(Exception):
    """Ends an extraction."""


def test_a_resumed_extraction_has_the_same_bytes(gemma: tuple[Any, Path], tmp_path: Path) -> None:
    def stop(doing: str, done: float, _total: float | None, _unit: str) -> None:
        if doing == "extracting" and done >= 1:
            raise Stopped

    with pytest.raises(Stopped):
        extract(gemma[0], tmp_path / "a.act", report=stop)
    assert extract(gemma[0], tmp_path / "a.act", with_index=False).complete
    assert hashes(tmp_path / "a.act", "arrays") == hashes(gemma[1], "arrays")
    assert verify(tmp_path / "a.act").ok


def test_one_pattern_is_alive_at_a_time_and_a_split_batch_is_written_again(
    gemma: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[weakref.ref[torch.Tensor]] = []
    n_failed, keep = 0, AttentionBatch.keep

    def watched(self: AttentionBatch, layer: int, pattern: torch.Tensor) -> None:
        nonlocal n_failed
        assert not any(one() is not None for one in met)
        met.append(weakref.ref(pattern))
        keep(self, layer, pattern if layer != 1 or n_failed else pattern * 0)  # what is half done must not stay
        if layer == 1 and len(pattern) > 1 and n_failed < 2:
            n_failed += 1
            met.clear()  # the error's frames hold it
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AttentionBatch, "keep", watched)
    extract(gemma[0], tmp_path / "a.act", with_index=False)
    found, expected = truth_of(tmp_path / "a.act"), truth_of(gemma[1])
    assert n_failed == 2
    for layer in range(3):
        for name in ("weights", "offsets", "values"):
            one, other = (truth.matrix(f"attention/{layer}/{name}") for truth in (found, expected))
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_attention_is_added_to_a_store_and_dropped_layer_by_layer(
    gemma: tuple[Any, Path], whole: Path, tmp_path: Path
) -> None:
    path = copied(whole, tmp_path)
    with actstore.open(path) as store:
        assert store.sql("FROM heads").rows() == []
        with pytest.raises(UnknownName, match=r"'1'.*--into STORE --attention-top K"):
            store.sql("SELECT edges(1, row) FROM tokens")
    extract(gemma[0], path, texts=None, into=True)
    added = hashes(path, "arrays/attention")
    assert added == hashes(gemma[1], "arrays/attention") and len(added) > 9
    with actstore.open(path) as two_steps, actstore.open(gemma[1]) as one:
        for table in ("attention", "attention_rows", "heads"):
            assert two_steps.sql(f"FROM {table} ORDER BY ALL").rows() == one.sql(f"FROM {table} ORDER BY ALL").rows()
    drop(path, "attention/1")
    with actstore.open(path) as store:
        assert {row["layer"] for row in store.sql("SELECT DISTINCT layer FROM attention").rows()} == {0, 2}
        with pytest.raises(UnknownName, match=r"layer of stored attention '1'.*0, 2"):
            store.sql("SELECT edges(1, row) FROM tokens")
    assert verify(path).ok
    with pytest.raises(InvalidInput, match=r"attention/1 was made .* drop the other layers of attention too"):
        extract(gemma[0], path, texts=None, into=True)
    drop(path, "attention/0")
    drop(path, "attention/2")
    extract(gemma[0], path, texts=None, into=True, with_index=False)
    assert hashes(path, "arrays/attention") == added


def test_arrays_have_their_axes_and_open_in_zarr(gemma: tuple[Any, Path]) -> None:
    arrays: Any = zarr.open_group(gemma[1] / "arrays", mode="r")
    assert arrays["attention/2/weights"].metadata.dimension_names == ("row", "head", "k")
    assert arrays["attention/2/values"].metadata.dimension_names == ("row", "head", "field")
    assert arrays["attention/2/values"].attrs["columns"] == list(ATTENTION_VALUES)
    assert arrays["attention/2/offsets"].shape[1:] == (6, 3)
    assert (gemma[1] / "arrays/attention/0/weights/c.1.0.0").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ties_go_to_the_lower_key_and_zero_is_no_edge(dtype: torch.dtype) -> None:
    weights = torch.tensor([[[0.25, 0.0, 0.25, 0.5, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]], dtype=dtype)
    heaviest, keys = _heaviest(weights, 3)
    assert keys.tolist() == [[[3, 0, 2], [0, -1, -1]]]
    assert torch.equal(heaviest.nan_to_num(-1.0), torch.tensor([[[0.5, 0.25, 0.25], [1.0, -1.0, -1.0]]]))
    heaviest, keys = _heaviest(weights[..., :2], 3)
    assert keys.tolist() == [[[0, -1, -1], [0, -1, -1]]]


@pytest.mark.parametrize("n_keys", [1, 700, 1 << 16, (1 << 16) + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_heaviest_are_those_of_a_stable_sort(dtype: torch.dtype, n_keys: int) -> None:
    random = torch.Generator().manual_seed(n_keys)
    weights = torch.randn((2, 2, n_keys), generator=random).mul(3).softmax(-1).to(dtype)  # ties, in bfloat16
    weights[0, 0, n_keys // 2 :] = torch.finfo(dtype).tiny / 4  # numbers below the smallest normal one count too
    heaviest, keys = _heaviest(weights, n_keys)
    expected = weights.float().sort(dim=-1, descending=True, stable=True)
    assert heaviest.dtype == torch.float32 and torch.equal(heaviest, expected.values)
    assert torch.equal(keys.long(), expected.indices)


def test_what_is_not_a_number_is_no_edge() -> None:
    heaviest, keys = _heaviest(torch.tensor([[[torch.nan, -torch.nan]]]), 2)
    assert heaviest.isnan().all() and keys.tolist() == [[[-1, -1]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"attention_top": -1}, "0 or more", id="negative"),
        pytest.param({"attention_top": 2, "attention_min": 1.5}, "a weight from 0 to 1", id="weight_above_one"),
        pytest.param({"attention_top": 13}, "at most 12", id="more_than_a_window"),
        pytest.param({"saes": ["neurons:pattern.1"]}, "--attention-top", id="neurons_of_a_pattern"),
        pytest.param({"saes": ["tiny=SAE@pattern.1"]}, "cannot be about pattern.1", id="sae_of_a_pattern"),
        pytest.param({"lens_k": 2, "lens_sites": ["pattern.1"]}, "cannot read pattern.1", id="lens"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    named = write_sae(tmp_path, "layer_1/width_16/average_l0_3", firing_arrays(rows, 16, 0), release="tiny-att")
    folder = Path(shutil.copytree(named, tmp_path / "unnamed"))  # its path says no site
    asked: dict[str, Any] = {"sites": ["z.0"], "attention_top": 0} | options
    asked["saes"] = [one.replace("SAE", str(folder)) for one in options.get("saes", ())]
    with pytest.raises(InvalidInput, match=message):
        extract(case_model("gemma_2"), tmp_path / "a.act", **asked)


def test_the_plan_counts_edges_and_bytes(tmp_path: Path) -> None:
    case_model("gemma_2").save_pretrained(tmp_path / "model")
    words(bos=True).save_pretrained(tmp_path / "model")
    asked: dict[str, Any] = {"model": tmp_path / "model", "dataset": TEXTS, "out": tmp_path / "a.act"}
    sizes: dict[str, Any] = {"context": CONTEXT, "shard_rows": 32, "batch_tokens": BATCH_TOKENS, "predictions": False}
    plan = plan_extraction(Request(**asked, **sizes, attention_top=4, sites=("pattern.1",)))
    bytes_of = {size.artifact: size.n_bytes for size in plan.artifacts}
    assert plan.edges_per_token == 3 * 6 * 4 and "72 edges of attention" in str(plan)
    assert bytes_of["attention/0"] == plan.n_rows * 6 * (4 * 8 + 6 * 4)
    assert bytes_of["sites/pattern.1"] == plan.n_rows * 6 * CONTEXT * 4 // 2  # no row looks ahead
    without = plan_extraction(Request(**asked, **sizes, sites=("pattern.1",)))
    assert plan.index_bytes - without.index_bytes == int(plan.n_rows * 18 * (8 + 4 * 5.2))
