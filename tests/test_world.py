"""The embedded world: the committed assets are what the generator, the model and the SAEs promise."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "world"))
ASSETS = ROOT / "actstore" / "demo" / "assets"
MEBIBYTE = 2**20

capture = importlib.import_module("capture")
grammar = importlib.import_module("grammar")
make_dataset = importlib.import_module("make_dataset")
truth = importlib.import_module("truth")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world_model() -> tuple[Any, Any]:
    model, tokenizer = capture.load()
    return model, tokenizer


@pytest.fixture(scope="module")
def documents() -> list[Any]:
    found: list[Any] = make_dataset.demo_documents()
    return found


@pytest.fixture(scope="module")
def sample(world_model: tuple[Any, Any], documents: list[Any]) -> Any:
    model, tokenizer = world_model
    return capture.capture(model, tokenizer, [document.text for document in documents[:200]], list(capture.SAE_SITES))


def test_assets_stay_small() -> None:
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 8 * MEBIBYTE
    assert sizes[ASSETS / "dataset.jsonl"] <= 1.2 * MEBIBYTE


def test_model_has_the_traits_of_gemma_2(world_model: tuple[Any, Any]) -> None:
    config = world_model[0].config
    assert config.model_type == "gemma2"
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 3
    assert config.sliding_window < 128
    assert config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    stored = json.loads((ASSETS / "model" / "config.json").read_text())
    assert stored["dtype"] == "bfloat16"


def test_dataset_is_what_the_generator_writes() -> None:
    assert (ASSETS / "dataset.jsonl").read_text() == make_dataset.dataset_text()


def test_ground_truth_spans_hold_what_they_name(documents: list[Any]) -> None:
    kinds = set()
    for document in documents:
        kinds.add(document.kind)
        for span in document.spans:
            covered = document.text[span.start : span.end]
            if span.label == "repeated_name":
                assert covered == span.value
                assert f" {covered}" in document.text[: span.start]
            if span.label == "list_stop":
                assert document.text[: span.start].count("\n") == int(span.value)
                assert document.text[span.start : span.start + 2] == "\n\n"
            if span.label == "topic_due":
                assert document.text[span.end :] == f" {span.value}."
    assert kinds == {"fact", "list", "headline", "roll_call", "review"}


def test_held_out_wordings_never_appear(documents: list[Any]) -> None:
    text = "\n".join(document.text for document in documents)
    asked = [f"{fact.question(wording)} {fact.answer}." for fact in grammar.FACTS for wording in range(8)]
    unseen = [f"{question} {fact.answer}." for fact in grammar.FACTS for question in fact.unseen_questions()]
    assert sum(question in text for question in asked) > 1_000
    assert len(unseen) > 650
    assert [question for question in unseen if question in text] == []


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("Ada lives in Velmar.\n- plum\n\nDone.", id="newlines"),
        pytest.param("two  spaces,\ttabs and 1234 digits", id="spaces and digits"),
        pytest.param("naïve café 日本語 🙂", id="bytes"),
        pytest.param(" leading and trailing ", id="edges"),
    ],
)
def test_tokenizer_gives_back_any_text(world_model: tuple[Any, Any], text: str) -> None:
    tokenizer = world_model[1]
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded.input_ids[0] == tokenizer.bos_token_id == 2
    assert tokenizer.unk_token_id not in encoded.input_ids
    assert tokenizer.decode(encoded.input_ids[1:]) == text
    assert encoded.offset_mapping[-1][1] == len(text)


def test_special_tokens_have_gemmas_ids(world_model: tuple[Any, Any]) -> None:
    assert world_model[1].convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>"]) == [0, 1, 2, 3]


def test_newlines_and_punctuation_stand_alone(world_model: tuple[Any, Any]) -> None:
    assert world_model[1].tokenize("Ada:\n- plum.\n\n12") == [
        "A",
        "da",
        ":",
        "\n",
        "-",
        "▁plum",
        ".",
        "\n",
        "\n",
        "1",
        "2",
    ]


def test_tokens_of_a_prompt_begin_those_of_its_continuation(world_model: tuple[Any, Any], documents: list[Any]) -> None:
    for document in documents[:100]:
        ids = world_model[1](document.text).input_ids
        for end in (place for place, letter in enumerate(document.text) if letter in " \n.:"):
            prompt = world_model[1](document.text[:end]).input_ids
            assert ids[: len(prompt)] == prompt


def test_facts_are_recalled_in_unseen_wordings(world_model: tuple[Any, Any]) -> None:
    evaluate = importlib.import_module("evaluate")
    asked = grammar.FACTS[::4]
    prompts = [f"{evaluate.FACT_OPENER} {fact.unseen_questions()[-1]}" for fact in asked]
    answers = [world_model[1](f" {fact.answer}", add_special_tokens=False).input_ids[0] for fact in asked]
    top = evaluate.next_tokens(*world_model, prompts)
    assert np.mean(np.array(top) == np.array(answers)) >= 0.95


@pytest.mark.parametrize("site", capture.SAE_SITES)
def test_sae_has_gemma_scopes_arrays_and_reconstructs(site: str, sample: Any) -> None:
    sae, x = capture.load_sae(site), sample.activations[site]
    width_in, width = x.shape[1], 1_024
    assert {name: array.shape for name, array in sae.items()} == {
        "W_enc": (width_in, width),
        "W_dec": (width, width_in),
        "b_enc": (width,),
        "b_dec": (width_in,),
        "threshold": (width,),
    }
    assert all(array.dtype == np.float32 for array in sae.values())
    assert (sae["threshold"] > 0).all()
    np.testing.assert_allclose(np.linalg.norm(sae["W_dec"], axis=1), 1.0, atol=1e-3)
    features = capture.encode(sae, x)
    assert capture.unexplained_variance(x, capture.decode(sae, features)) <= 0.10
    mean_l0 = (features > 0).sum(axis=1).mean()
    assert mean_l0 <= 128 / 8
    assert abs(mean_l0 - int(capture.sae_path(site).parent.name.removeprefix("average_l0_"))) < 1


def test_report_meets_every_requirement_and_random_weights_fail() -> None:
    report = json.loads((ROOT / "world" / "report.json").read_text())
    failed = [entry["name"] for entry in report["requirements"] if not entry["ok"]]
    assert failed == []
    assert not all(entry["ok"] for entry in report["random_requirements"])
    assert report["figures"]["recall"]["all"] >= 0.95


def test_guide_points_at_what_is_there(world_model: tuple[Any, Any], documents: list[Any], sample: Any) -> None:
    guide = json.loads((ASSETS / "guide.json").read_text())
    make_guide = importlib.import_module("make_guide")
    lens = guide["lens"]
    table = make_guide.answer_by_layer(*world_model, lens["prompt"], lens["answer"])
    assert table[-1]["answer_rank"] == 0
    for entry in guide["features"]:
        assert (ASSETS / entry["sae"] / "params.npz").is_file()
        features = capture.encode(capture.load_sae(entry["site"]), sample.activations[entry["site"]])
        label, value = truth.QUESTIONS[entry["question"]]
        actual = truth.row_labels(sample, documents[:200], label, value)
        assert truth.f1_score(features[:, entry["feature"]] >= entry["threshold"], actual) >= 0.8
