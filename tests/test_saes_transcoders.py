"""Transcoders of every format: read as their equation says, at two sites on which all who say them agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saes_support import (
    write_saelens,
    write_safetensors,
)
from transcoder_support import (
    CASES,
    D_IN,
    D_SAE,
    HOOKS,
    ROWS,
    SECOND,
    doubles,
    load,
    relu,
    rows,
    sparsify,
    transcoder_arrays,
    unnamed,
    write_llama_transcoder,
    write_saelens_transcoder,
    write_second,
)

from actstore.errors import InvalidInput, UnsupportedFormat
from actstore.saes import (
    SaeEncoder,
    expand_sae_arguments,
    load_sae,
    sae_sizes,
)


@pytest.mark.parametrize("name", CASES)
def test_a_transcoder_is_its_equation(tmp_path: Path, name: str) -> None:
    case = CASES[name](tmp_path)
    (resolved,) = expand_sae_arguments([case.argument])
    coder = load_sae(resolved)
    identity = coder.identity
    assert (identity.site, identity.write_site) == (case.read, case.write)
    assert identity.architecture.startswith(case.architecture)
    assert (sae_sizes(resolved).d_in, coder.d_in, coder.d_out) == (D_IN, D_IN, case.decoded.shape[1])
    targets = rows(coder.d_out, 6)
    tile = SaeEncoder(coder, "cpu").encode(torch.from_numpy(ROWS), targets=torch.from_numpy(targets))
    features = np.zeros((len(ROWS), D_SAE), np.float32)
    features[np.repeat(np.arange(len(ROWS)), tile.counts.numpy()), tile.features.numpy()] = tile.activations.numpy()
    assert 0.01 < (case.features > 0).mean() < 0.9, "some fire and some do not"
    np.testing.assert_allclose(features, case.features, rtol=2e-4, atol=2e-5)
    l0, norm, error_norm = tile.reconstruction.numpy().T
    np.testing.assert_array_equal(l0, (case.features > 0).sum(1))
    np.testing.assert_allclose(norm, np.linalg.norm(targets, axis=1), rtol=1e-5)
    np.testing.assert_allclose(error_norm, np.linalg.norm(targets - case.decoded, axis=1), rtol=1e-4)


def test_a_skip_on_an_sae_of_sparsify_is_of_the_row_as_it_is(tmp_path: Path) -> None:
    case = sparsify("layers.7", "", "")(tmp_path)
    config = Path(case.argument) / "cfg.json"
    config.write_text(config.read_text().replace('"transcode": true', '"transcode": false'))
    coder = load(case.argument)
    assert (coder.identity.site, coder.identity.write_site, coder.subtracts_b_dec) == ("resid_post.7", None, True)
    a = doubles(transcoder_arrays(D_IN, D_IN))
    pre = relu((ROWS - a["b_dec"]) @ a["W_enc"] + a["b_enc"])
    f = np.where(pre >= np.sort(pre, axis=1)[:, -5:-4], pre, 0)
    error = SaeEncoder(coder, "cpu").encode(torch.from_numpy(ROWS)).reconstruction[:, 2].numpy()
    expected = np.linalg.norm(ROWS - (f @ a["W_dec"] + a["b_dec"] + ROWS @ a["skip"]), axis=1)
    np.testing.assert_allclose(error, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("path", "sae", "sites", "neuronpedia"),
    [
        pytest.param(
            "google/gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_54",
            "3-gemmascope-transcoder-16k",
            ("ln2_normalized.3", "mlp_out.3"),
            "gemma-2-2b/3-gemmascope-transcoder-16k",
            id="neuronpedias",
        ),
        pytest.param(
            "google/gemma-scope-2b-pt-transcoders/layer_12/width_16k/average_l0_6",
            "12-gemmascope-transcoder-16k",
            ("ln2_normalized.12", "mlp_out.12"),
            "gemma-2-2b/12-gemmascope-transcoder-16k",
            id="neuronpedias_is_far_from_100",
        ),
        pytest.param(
            "google/gemma-scope-2b-pt-transcoders/layer_12/width_16k/average_l0_32",
            "12-gemmascope-transcoder-16k__l0-32",
            ("ln2_normalized.12", "mlp_out.12"),
            None,
            id="nearest_100_and_not_neuronpedias",
        ),
        pytest.param(
            "somebody/tiny-scope-transcoders/layer_1/width_48/average_l0_6",
            "1-tiny-scope-transcoders-48__l0-6",
            ("ln2_normalized.1", "mlp_out.1"),
            None,
            id="another_release",
        ),
        pytest.param(
            "google/gemma-scope-2b-pt-res/embedding/width_4k/average_l0_111",
            "embedding-gemmascope-res-4k__l0-111",
            ("embed_raw", "None"),
            None,
            id="embedding",
        ),
    ],
)
def test_a_path_says_sites_and_id(path: str, sae: str, sites: tuple[str, str], neuronpedia: str | None) -> None:
    (found,) = expand_sae_arguments([path])
    assert found.name is not None
    assert (found.sae, found.name.neuronpedia_id) == (sae, neuronpedia)
    assert (str(found.site), str(found.write_site)) == sites
    assert path.endswith(found.name.inner_path)


def test_the_argument_says_both_sites_where_the_file_says_none(tmp_path: Path) -> None:
    folder = unnamed(tmp_path / "mine", transcoder_arrays())
    identity = load(f"{folder}@ln2.5>mlp_out.5").identity
    assert (identity.sae, identity.site, identity.write_site) == ("ln2.5-mine", "ln2.5", "mlp_out.5")
    aliased = f"{folder}@blocks.5.ln2.hook_normalized>blocks.5.hook_mlp_out"
    assert load(aliased).identity.site == "ln2_normalized.5"


def refused(argument: str | Path) -> str:
    with pytest.raises(InvalidInput) as caught:
        load(argument)
    return str(caught.value)


def test_what_the_argument_says_wins_over_the_configuration(tmp_path: Path) -> None:
    folder, _ = write_second(tmp_path)
    assert load(f"{folder}@ln2.13").identity.write_site == "mlp_out.13"
    for sites, told in (
        ("ln2.13>mlp_out.13", None),
        ("ln2_normalized.13>mlp_out.13", "site ln2_normalized.13 as asked; its path or config.json says ln2.13"),
        ("ln2.13>mlp_out.12", "site mlp_out.12 as asked; its path or config.json says mlp_out.13"),
    ):
        (found,) = expand_sae_arguments([f"{folder}@{sites}"])
        assert (f"{found.site}>{found.write_site}", found.overruled) == (sites, told)


def test_what_neither_argument_nor_file_says_is_refused(tmp_path: Path) -> None:
    folder, _ = write_second(tmp_path)
    write_second(tmp_path, hf_hook_point_out="model.layers.13.unheard.output")
    message = refused(folder)
    assert "Nothing says which site the SAE" in message and f"'{folder}@ln2.13>mlp_out.12'" in message
    assert load(f"{folder}@ln2.13>mlp_out.13").identity.write_site == "mlp_out.13"
    write_second(tmp_path, hf_hook_point_out=SECOND["hf_hook_point_in"])
    assert "reads and writes ln2.13" in refused(folder)


def test_an_sae_writes_what_it_reads(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, {name: transcoder_arrays(D_IN, D_IN)[name] for name in NO_THRESHOLD})
    assert "reconstructs what it reads" in refused(f"{folder}@resid_pre.3>mlp_out.3")
    named = tmp_path / "tiny-scope-mlp" / "layer_1" / "width_48" / "average_l0_6"
    unnamed(named, transcoder_arrays(D_IN, D_IN))
    assert "reconstructs what it reads" in refused(f"{named}@mlp_out.1>mlp_out.1")
    with pytest.raises(InvalidInput, match="not the name of a site"):
        expand_sae_arguments([f"{named}@mlp_out.1>"])


NO_THRESHOLD = ("W_enc", "W_dec", "b_enc", "b_dec")


@pytest.mark.parametrize(
    ("hooks", "argument", "expected"),
    [
        pytest.param({}, "", "ln2.3", id="the_hugging_face_name_counts"),
        pytest.param(
            {"hook_name": "blocks.3.ln2.hook_normalized", "hf_hook_name": None}, "", "ln2_normalized.3", id="tl"
        ),
        pytest.param({"hook_name": "blocks.3.mlp.hook_in", "hf_hook_name": None}, "", "ln2.3", id="bridge"),
        pytest.param({"hf_hook_name": None}, "@ln2.3", "ln2.3", id="chosen"),
        pytest.param({"hf_hook_name": None}, "@resid_mid.3", "resid_mid.3", id="chosen_as_it_is_called"),
    ],
)
def test_hook_mlp_in(tmp_path: Path, hooks: dict[str, Any], argument: str, expected: str) -> None:
    folder, _ = write_saelens_transcoder(tmp_path, "jumprelu_skip_transcoder", HOOKS | hooks)
    assert load(f"{folder}{argument}").identity.site == expected


def test_hook_mlp_in_alone_is_ambiguous(tmp_path: Path) -> None:
    folder, _ = write_saelens_transcoder(tmp_path, "transcoder", HOOKS | {"hf_hook_name": None})
    assert "says that it reads ln2.3 and ln2_normalized.3 and resid_mid.3" in refused(folder)
    write_saelens_transcoder(tmp_path, "transcoder", HOOKS | {"hook_name": "blocks.3.ln2.hook_normalized"})
    assert "says that it reads ln2_normalized.3 and ln2.3" in refused(folder)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("transcoder", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input is true"),
        ("transcoder", {"normalize_activations": "layer_norm"}, r"normalised \(layer_norm\)"),
        ("standard", {}, "hook_name_out is '.*', and it is no transcoder"),
        ("transcoder", {"metadata": HOOKS | {"model_name": "gpt2", "model_from_pretrained_kwargs": {
            "center_writing_weights": True}}}, r"normalised \(centred\)"),
    ],
    ids=["b_dec_subtracted", "normalised", "an_sae_that_writes_elsewhere", "centred_weights"],
)  # fmt: skip
def test_a_saelens_configuration_that_no_transcoder_has(
    tmp_path: Path, architecture: str, changes: dict[str, Any], message: str
) -> None:
    folder, _ = write_saelens_transcoder(tmp_path, architecture, **changes)
    with pytest.raises(UnsupportedFormat, match=message):
        load(folder)


def test_whether_gemma_scope_2_has_a_skip_is_said_by_flag_or_name(tmp_path: Path) -> None:
    folder, _ = write_second(tmp_path, affine_connection=None)
    assert load(folder).w_skip is not None
    folder, _ = write_second(tmp_path, name="layer_13_width_48_l0_big", affine_connection=None, skip=False)
    assert load(folder).w_skip is None


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("Llama3_1-8B-Base-L15TC-8x", {"hook_point_in": None, "hook_point_out": None}, id="by_name"),
        pytest.param("my_transcoder", {}, id="by_hooks"),
    ],
)
def test_llama_scope_says_a_transcoder(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    folder, _ = write_llama_transcoder(tmp_path, name, **changes)
    identity = load(folder).identity
    assert (identity.site, identity.write_site) == ("ln2_normalized.15", "mlp_out.15")


def saved(root: Path, **changes: Any) -> Path:
    """Write a Gemma Scope 2 transcoder with some tensors changed, or taken away."""
    _, arrays = write_second(root / "sound")
    tensors = {name.lower(): array for name, array in arrays.items() if name != "skip"}
    tensors["affine_skip_connection"] = arrays["skip"]
    tensors = {name: array for name, array in (tensors | changes).items() if array is not None}
    return write_safetensors(root / "transcoder" / "bad", "params.safetensors", tensors, "config.json", SECOND)


A = transcoder_arrays()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"affine_skip_connection": A["skip"].T},
            "w_skip is (14, 10) (it is transposed), where b_enc and b_dec ask for (10, 14)",
            id="skip_transposed",
        ),
        pytest.param({"affine_skip_connection": None}, "affine_skip_connection is missing", id="no_skip"),
        pytest.param({"w_enc": A["W_enc"].T}, "w_enc is (48, 10) (it is transposed)", id="encoder_transposed"),
        pytest.param({"w_dec": A["W_dec"].T}, "w_dec is (14, 48) (it is transposed)", id="decoder_transposed"),
        pytest.param({"b_dec": A["b_dec"][:10]}, "w_dec is (48, 14), where", id="b_dec_of_the_input"),
        pytest.param(
            {"affine_skip_connection": np.full_like(A["skip"], np.nan)}, "w_skip has NaN or infinity", id="nan"
        ),
        pytest.param({"threshold": -A["threshold"]}, "48 thresholds are not positive", id="threshold_negative"),
        pytest.param({"threshold": A["threshold"] * 0}, "48 thresholds are not positive", id="threshold_zero"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in refused(saved(tmp_path, **changes))


def test_a_configuration_that_the_weights_contradict(tmp_path: Path) -> None:
    folder, _ = write_second(tmp_path, affine_connection=False)
    assert "affine_skip_connection is not part of the format" in refused(folder)
    folder, _ = write_second(tmp_path, type="sae", hf_hook_point_out=None, affine_connection=False, skip=False)
    assert "w_enc is (10, 48), where b_enc and b_dec ask for (14, 48)" in refused(folder)
    folder, _ = write_saelens_transcoder(tmp_path, "transcoder", d_out=16)
    assert "it writes 14 numbers, and 16 by its cfg.json" in refused(folder)
