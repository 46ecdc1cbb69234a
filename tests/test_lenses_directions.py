"""`unembed`, `feature_direction`, `lens_logits`, and how `act` gathers: against weights' own files and raw arrays."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking_support import ATT, MODEL, RES, SmallStore, reference_model
from hypothesis import given, settings
from hypothesis import strategies as st
from kit_support import extract_family, logits_of, weights_of
from safetensors.numpy import load_file

import actstore
from actstore.api import Store
from actstore.errors import InvalidInput, UnknownName
from actstore.lenses.directions import Directions
from actstore.store.gathering import ChunkCache


def weights() -> dict[str, np.ndarray]:
    """Return the embedded model's weights, float64."""
    return {name: array.astype(np.float64) for name, array in load_file(MODEL / "model.safetensors").items()}


def direction(store: Store, sae: str, feature: int) -> np.ndarray:
    return np.array(store.sql("SELECT feature_direction(?, ?)", [sae, feature]).scalar())


# Directions


def test_unembed_is_the_models_own_row_for_every_token(opened: Store) -> None:
    found = opened.sql("SELECT unembed(token_id) AS vector FROM vocabulary ORDER BY token_id").table["vector"]
    np.testing.assert_array_equal(
        np.stack([np.asarray(row.values) for chunk in found.chunks for row in chunk]),
        load_file(MODEL / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32),
    )


@pytest.mark.parametrize("feature", [0, 7, 255])
def test_a_direction_of_the_stream_is_the_decoder_row(opened: Store, small: SmallStore, feature: int) -> None:
    np.testing.assert_array_equal(direction(opened, RES, feature), small.saes[RES]["W_dec"][feature])


@pytest.mark.parametrize("feature", [0, 7, 95])
def test_a_direction_of_heads_goes_through_w_o_and_the_post_norms_gain(
    opened: Store, small: SmallStore, feature: int
) -> None:
    model = weights()
    written = small.saes[ATT]["W_dec"][feature].astype("f8") @ model["model.layers.2.self_attn.o_proj.weight"].T
    expected = written * (1 + model["model.layers.2.post_attention_layernorm.weight"])
    np.testing.assert_allclose(direction(opened, ATT, feature), expected, atol=1e-5)


NEURONS = {
    "gemma_2": ("model.layers.1.mlp.down_proj.weight", "model.layers.1.post_feedforward_layernorm.weight"),
    "gpt_2": ("transformer.h.1.mlp.c_proj.weight", None),
}


@pytest.mark.parametrize("name", NEURONS)
def test_a_neurons_direction_is_its_row_of_the_matrix_behind_it(tmp_path: Path, name: str) -> None:
    saes = ["neurons:mlp_act.1", "neurons:resid_post.1"]
    model = weights_of(extract_family(name, tmp_path / "a.act", ("resid_post.2",), saes=saes))
    matrix, gain = NEURONS[name]
    w_down = model[matrix] if name == "gpt_2" else model[matrix].T
    with actstore.open(tmp_path / "a.act") as store:
        expected = w_down[5] * (1 if gain is None else 1 + model[gain])
        np.testing.assert_allclose(direction(store, "1-neurons-mlp_act", 5), expected, atol=1e-6)
        np.testing.assert_array_equal(direction(store, "1-neurons-resid_post", 3), np.eye(24)[3])


def test_directions_of_several_features_and_saes_come_in_order(opened: Store) -> None:
    asked = [(RES, 3), (ATT, 3), (RES, 9), (RES, 3), (ATT, 0)]
    question = "SELECT feature_direction(sae, feature) AS v FROM (SELECT unnest($saes) AS sae, unnest($ids) AS feature)"
    found = opened.sql(question, {"saes": [sae for sae, _ in asked], "ids": [one for _, one in asked]}).rows()
    for (sae, feature), row in zip(asked, found, strict=True):
        np.testing.assert_allclose(row["v"], direction(opened, sae, feature), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("feature_direction('nothing', 0)", "stored SAE 'nothing'"),
        (f"feature_direction('{RES}', 256)", "There is no feature 256 of .* 0 to 255"),
        (f"feature_direction('{RES}', -1)", "There is no feature -1"),
        ("unembed(1664)", "There is no token 1664.*0 to 1663"),
        ("lens_logits('resid_post.1', 0, [3, -1])", "There is no token -1"),
        ("lens_logits('z.2', 0, [1])", "it is not the residual stream"),
        ("lens_logits('resid_post.1', 0, [1, NULL])", "has NULL"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(opened: Store, call: str, message: str) -> None:
    with pytest.raises((UnknownName, InvalidInput), match=message):
        opened.sql(f"SELECT {call}")


def test_features_of_a_site_that_is_not_on_the_way_have_no_direction(tmp_path: Path) -> None:
    extract_family("llama", tmp_path / "a.act", ("resid_post.2",), saes=["neurons:ln2.1"])
    with actstore.open(tmp_path / "a.act") as store, pytest.raises(InvalidInput, match=r"ln2\.1 is not on the way"):
        direction(store, "1-neurons-ln2", 0)


# Logits


@pytest.mark.parametrize("name", ["gemma_2", "gpt_2"])
def test_lens_logits_at_the_last_site_are_transformers_own_after_the_cap(tmp_path: Path, name: str) -> None:
    model = extract_family(name, tmp_path / "a.act", ("resid_post.2",))
    with actstore.open(tmp_path / "a.act") as store:
        expected = logits_of(model, store)
        everything = list(range(expected.shape[1]))
        question = "SELECT lens_logits('resid_post.2', row, $ids) AS logits FROM tokens ORDER BY row"
        found = [row["logits"] for row in store.sql(question, {"ids": everything}).rows()]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        one_each = "SELECT row, lens_logits('resid_post.2', row, range(row % 4)::INTEGER[]) AS logits FROM tokens"
        for row in store.sql(one_each).rows():
            np.testing.assert_allclose(row["logits"], expected[row["row"], : row["row"] % 4], atol=1e-4)


def test_lens_logits_of_many_different_tokens_agree_with_the_lens(opened: Store, small: SmallStore) -> None:
    """Lists with no token in common go another way than lists that are alike."""
    question = """WITH best AS (
                      SELECT row, list_first(logit_lens('resid_post.4', row, 1)).token_id AS best FROM tokens
                      ORDER BY row LIMIT 300
                  )
                  SELECT row, lens_logits('resid_post.4', row, [CAST(row % 1664 AS INTEGER)]) AS one,
                         lens_logits('resid_post.4', row, [best]) AS top
                  FROM best ORDER BY row"""
    found = opened.sql(question).rows()
    model = reference_model()
    stream = small.truth.matrix("sites/resid_post.4")[:300]
    scaled = stream / np.sqrt((stream.astype("f8") ** 2).mean(1, keepdims=True) + 1e-6)
    logits = (scaled * (1 + weights()["model.norm.weight"])) @ model.lm_head.weight.detach().double().numpy().T
    logits = 30 * np.tanh(logits / 30)
    for number, row in enumerate(found):
        assert row["one"][0] == pytest.approx(logits[number, row["row"] % 1664], abs=1e-3)
        assert row["top"][0] == pytest.approx(logits[number].max(), abs=1e-3)


# The whole store


def test_the_rows_nearest_to_a_feature_are_those_of_numpy_and_its_direction_is_made_once(
    opened: Store, small: SmallStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = Directions.of_features

    def counted(self: Directions, sae: str, features: Any) -> Any:
        made.append(len(features))
        return original(self, sae, features)

    monkeypatch.setattr(Directions, "of_features", counted)
    for where, bound in ((f"'{RES}', 17", {}), ("$sae, $feature", {"sae": RES, "feature": 17})):
        question = f"""SELECT row FROM tokens
            ORDER BY list_cosine_similarity(act('resid_post.3', row), feature_direction({where})) DESC LIMIT 20"""
        found = [row["row"] for row in opened.sql(question, bound).rows()]
        stream = small.truth.matrix("sites/resid_post.3").astype("f8")
        cosine = stream @ small.saes[RES]["W_dec"][17] / np.linalg.norm(stream, axis=1)
        assert found == small.truth.rows[np.argsort(-cosine)[:20]].tolist()
        assert len(made) <= 2 and sum(made) <= 2, "a constant was computed for many rows"
        made.clear()


# Gathering


class Rows:
    """An array that counts what is read of it."""

    def __init__(self, n_rows: int, chunk_rows: int) -> None:
        self.values = np.random.default_rng(n_rows).normal(size=(n_rows, 3)).astype(np.float32)
        self.shape, self.dtype, self.chunks = self.values.shape, self.values.dtype, (chunk_rows, 3)
        self.read_rows: list[int] = []

    def read(self, span: slice) -> np.ndarray:
        self.read_rows += range(span.start, span.stop)
        return self.values[span]


@settings(deadline=None, max_examples=150)
@given(
    n_rows=st.integers(1, 90),
    chunk_rows=st.integers(1, 20),
    limit=st.integers(0, 600),
    wanted=st.lists(st.lists(st.integers(0, 10_000), max_size=40), min_size=1, max_size=4),
)
def test_any_rows_come_in_order_and_each_chunk_is_read_once(
    n_rows: int, chunk_rows: int, limit: int, wanted: list[list[int]]
) -> None:
    array, cache = Rows(n_rows, chunk_rows), ChunkCache(limit)
    for numbers in wanted:
        rows = np.array(numbers, dtype=np.int64) % n_rows
        array.read_rows.clear()
        np.testing.assert_array_equal(cache.gather("a", array, rows, array.read), array.values[rows])
        assert len(set(array.read_rows)) == len(array.read_rows), "a chunk was read twice for one batch"
        assert {row // chunk_rows for row in array.read_rows} <= {row // chunk_rows for row in rows.tolist()}
        assert cache.n_bytes <= max(limit, chunk_rows * 3 * 4)
    if limit >= array.values.nbytes + chunk_rows * 3 * 4:
        array.read_rows.clear()
        cache.gather("a", array, np.array(wanted[-1], dtype=np.int64) % n_rows, array.read)
        assert array.read_rows == [], "what fits is kept"


def test_threads_that_ask_at_once_get_their_own_rows() -> None:
    array, cache = Rows(4000, 8), ChunkCache(50 * 8 * 3 * 4)
    parts = [np.random.default_rng(seed).integers(0, 4000, 500) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda rows: cache.gather("a", array, rows, array.read), parts))
    for rows, values in zip(parts, found, strict=True):
        np.testing.assert_array_equal(values, array.values[rows])


def test_chunks_of_two_arrays_are_not_taken_for_each_other() -> None:
    one, other, cache = Rows(10, 4), Rows(11, 4), ChunkCache()
    rows = np.arange(10)
    for name, array in {"one": one, "other": other}.items():
        np.testing.assert_array_equal(cache.gather(name, array, rows, array.read), array.values[rows])
