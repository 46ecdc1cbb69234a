"""`saelens:` and `neuronpedia:` names of Gemma Scope: by rule, without a registry."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from registry_support import empty_hub, named

from actstore.errors import UnknownName


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty_hub(monkeypatch, tmp_path / "hub")


RES, ATT, MLP, TC = (f"google/gemma-scope-2b-pt-{kind}" for kind in ("res", "att", "mlp", "transcoders"))


@pytest.mark.parametrize(
    ("name", "sae", "folder", "neuronpedia"),
    [
        pytest.param(
            "saelens:gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
            "20-gemmascope-res-16k",
            f"{RES}/layer_20/width_16k/average_l0_71",
            "gemma-2-2b/20-gemmascope-res-16k",
            id="release_that_is_canonical",
        ),
        pytest.param(
            "saelens:gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_38",
            "20-gemmascope-res-16k__l0-38",
            f"{RES}/layer_20/width_16k/average_l0_38",
            None,
            id="release",
        ),
        pytest.param(
            "saelens:gemma-scope-2b-pt-res-canonical/layer_5/width_65k/canonical",
            "5-gemmascope-res-65k",
            f"{RES}/layer_5/width_65k/average_l0_105",
            "gemma-2-2b/5-gemmascope-res-65k",
            id="canonical",
        ),
        pytest.param(
            "saelens:gemma-scope-9b-pt-att-canonical/layer_41/width_131k/canonical",
            "41-gemmascope-att-131k",
            "google/gemma-scope-9b-pt-att/layer_41/width_131k/average_l0_92",
            "gemma-2-9b/41-gemmascope-att-131k",
            id="attention_of_9b",
        ),
        pytest.param(
            "saelens:gemma-scope-2b-pt-transcoders/layer_12/width_16k/average_l0_6",
            "12-gemmascope-transcoder-16k",
            f"{TC}/layer_12/width_16k/average_l0_6",
            "gemma-2-2b/12-gemmascope-transcoder-16k",
            id="transcoder",
        ),
        pytest.param(
            "neuronpedia:gemma-2-2b/20-gemmascope-res-16k",
            "20-gemmascope-res-16k",
            f"{RES}/layer_20/width_16k/average_l0_71",
            "gemma-2-2b/20-gemmascope-res-16k",
            id="neuronpedia",
        ),
        pytest.param(
            "neuronpedia:gemma-2-9b-it/31-gemmascope-res-131k",
            "31-gemmascope-res-131k",
            "google/gemma-scope-9b-it-res/layer_31/width_131k/average_l0_109",
            "gemma-2-9b-it/31-gemmascope-res-131k",
            id="neuronpedia_instruction_tuned",
        ),
        pytest.param(
            "neuronpedia:gemma-2-2b/12-gemmascope-transcoder-16k",
            "12-gemmascope-transcoder-16k",
            f"{TC}/layer_12/width_16k/average_l0_6",
            "gemma-2-2b/12-gemmascope-transcoder-16k",
            id="neuronpedias_transcoder_is_not_the_one_nearest_100",
        ),
        pytest.param(
            "neuronpedia:gemma-2-2b/12-gemmascope-mlp-16k__l0-41",
            "12-gemmascope-mlp-16k__l0-41",
            f"{MLP}/layer_12/width_16k/average_l0_41",
            None,
            id="neuronpedia_with_an_l0",
        ),
        pytest.param(
            "neuronpedia:gemma-2-2b/embedding-gemmascope-res-4k__l0-21",
            "embedding-gemmascope-res-4k__l0-21",
            f"{RES}/embedding/width_4k/average_l0_21",
            None,
            id="the_embedding_with_an_l0",
        ),
    ],
)
def test_names_of_gemma_scope_need_no_registry(name: str, sae: str, folder: str, neuronpedia: str | None) -> None:
    assert named(name) == [(sae, folder, neuronpedia)]


@pytest.mark.parametrize(
    ("pattern", "first", "last", "number"),
    [
        ("neuronpedia:gemma-2-2b/*-gemmascope-res-16k", "0-gemmascope-res-16k", "25-gemmascope-res-16k", 26),
        ("neuronpedia:gemma-2-9b/20-gemmascope-*-16k", "20-gemmascope-att-16k", "20-gemmascope-res-16k", 3),
        (
            "saelens:gemma-scope-2b-pt-att-canonical/layer_*/width_65k/canonical",
            "0-gemmascope-att-65k",
            "25-gemmascope-att-65k",
            26,
        ),
        (
            "saelens:gemma-scope-2b-pt-res-canonical/layer_12/width_*/canonical",
            "12-gemmascope-res-1m",
            "12-gemmascope-res-524k",
            6,
        ),
    ],
)
def test_one_argument_takes_every_layer_of_a_release(pattern: str, first: str, last: str, number: int) -> None:
    ids = [sae for sae, _, _ in named(pattern)]
    assert (ids[0], ids[-1], len(ids)) == (first, last, number)


def test_patterns_of_sparsities_are_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = [f"layer_12/width_16k/average_l0_{l0}/params.npz" for l0 in (22, 82, 176)]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: listing)
    found = named("saelens:gemma-scope-2b-pt-res/layer_12/width_16k/*")
    assert [sae for sae, _, _ in found] == [
        "12-gemmascope-res-16k__l0-22",
        "12-gemmascope-res-16k",
        "12-gemmascope-res-16k__l0-176",
    ]


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("neuronpedia:gemma-2-2b/26-gemmascope-res-16k", "'gemma-2-2b/25-gemmascope-res-16k'"),
        ("neuronpedia:gemma-2-2b-it/20-gemmascope-res-16k", "gemma-2-2b/20-gemmascope-res-16k"),
        ("neuronpedia:gemma-2-3b/20-gemmascope-res-16k__l0-38", "gemma-2-2b/20-gemmascope-res-16k"),
        ("saelens:gemma-scope-2b-pt-res-canonical/layer_3/width_131k/canonical", "layer_3/width_16k"),
    ],
)
def test_a_name_that_google_does_not_have(name: str, offered: str) -> None:
    with pytest.raises(UnknownName, match=offered):
        named(name)
