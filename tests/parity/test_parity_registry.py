"""The tables and rules of Gemma Scope's names are SAELens' registry's, as the installed release has it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from actstore.saes import registry
from actstore.saes.aliases import google_folders
from actstore.saes.neuronpedia import google_sources
from actstore.saes.registry import Listed

if importlib.util.find_spec("sae_lens") is None:
    pytest.skip("sae-lens is not installed here", allow_module_level=True)


def entries() -> Iterator[Listed]:
    for release, body in registry._registry("all").items():
        yield from registry._of_release(release, body)


LISTED = list(entries())
OF_GOOGLE = [one for one in LISTED if one.repository.startswith("google/gemma-scope")]


def test_neuronpedias_plain_ids_are_the_registrys() -> None:
    expected = {
        one.neuronpedia_id: f"{one.repository}/{one.path}"
        for one in OF_GOOGLE
        if one.neuronpedia_id and "__l0-" not in one.neuronpedia_id
    }
    assert len(expected) > 600 and google_sources() == expected


MISPLACED = {  # ids that the registry gives to an SAE of another layer or sparsity than they say
    "gemma-2-9b/20-gemmascope-res-131k__l0-10",
    "gemma-2-9b/20-gemmascope-res-131k__l0-12",
}


def test_every_name_of_gemma_scope_is_its_place_in_the_registry() -> None:
    assert len(OF_GOOGLE) > 9_000
    for one in OF_GOOGLE:
        assert google_folders(f"saelens:{one.release}/{one.sae_id}") == [one.file], one
        if one.neuronpedia_id and one.neuronpedia_id not in MISPLACED:
            assert google_folders(f"neuronpedia:{one.neuronpedia_id}") == [one.file], one


def test_every_conversion_that_is_read_leads_to_weights() -> None:
    read = [one for one in LISTED if one.conversion in registry._FORMATS]
    assert len(read) / len(LISTED) > 0.9
    for one in read:
        assert one.format.names(one.file), one
        assert Path(one.file).suffix in (".npz", ".safetensors", ".pt")


def test_names_of_the_registry_lead_back_to_its_entries() -> None:
    (found,) = registry.meanings("neuronpedia:gpt2-small/8-res-jb")
    assert found[1] is not None and found[1].release == "gpt2-small-res-jb"
    assert found[0] == "jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre/sae_weights.safetensors"
    assert found[1].overrides == {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    assert len(registry.meanings("saelens:gpt2-small-res-jb/blocks.*.hook_resid_pre")) == 12
