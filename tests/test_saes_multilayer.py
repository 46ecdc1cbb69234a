"""Coders of several layers: each layer is read alone, and what they write is proved as the sum that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers_support import (
    CLT,
    CROSSCODER,
    D_SAE,
    N_LAYERS,
    WIDTH,
    equation,
    features_of,
    layer_arrays,
    load,
    rows_of,
    write_coder,
    write_layer,
)
from saes_support import Arrays

from actstore.errors import InvalidInput, UnsupportedFormat
from actstore.saes import (
    LayerSums,
    SaeEncoder,
    coders_together,
    expand_sae_arguments,
    load_sae,
    sae_sizes,
    unproved,
)


@pytest.mark.parametrize(
    ("inner", "skip", "sites"),
    [
        pytest.param(CLT, False, [("ln2.0", "mlp_out.0"), ("ln2.1", "mlp_out.1"), ("ln2.2", "mlp_out.2")], id="clt"),
        pytest.param(
            f"{CLT}_affine", True, [("ln2.0", "mlp_out.0"), ("ln2.1", "mlp_out.1"), ("ln2.2", "mlp_out.2")], id="affine"
        ),
        pytest.param(
            CROSSCODER, False, [("resid_post.1", None), ("resid_post.2", None), ("resid_post.5", None)], id="crosscoder"
        ),
    ],
)
def test_every_layer_is_a_coder_and_their_sum_is_the_equation(
    tmp_path: Path, inner: str, skip: bool, sites: list[tuple[str, str | None]]
) -> None:
    coders = load(write_coder(tmp_path / "google/gemma-scope-2-1b-pt", inner, skip=skip))
    assert [(coder.identity.site, coder.identity.write_site) for coder in coders] == sites
    assert (
        len({coder.identity.release for coder in coders}) == len({coder.identity.sae_id for coder in coders}) - 2 == 1
    )
    all_arrays = [layer_arrays(position, skip=skip) for position in range(N_LAYERS)]
    all_rows = [rows_of(position) for position in range(N_LAYERS)]
    sums = LayerSums(N_LAYERS)
    for position, coder in enumerate(coders):
        own, rows = all_arrays[position], all_rows[position]
        np.testing.assert_array_equal(coder.w_dec, own["w_dec"][:, position])
        encoder, targets = SaeEncoder(coder, "cpu"), rows_of(position + 50)
        tile = encoder.encode(torch.from_numpy(rows), None, torch.from_numpy(targets) if coder.transcodes else None)
        features = features_of(own, rows.astype(np.float64))
        l0, norm, error_norm = tile.reconstruction.numpy().T
        np.testing.assert_array_equal(l0, (features > 0).sum(1))
        np.testing.assert_allclose(tile.activations.numpy(), features[features > 0], rtol=1e-4, atol=1e-5)
        y = (targets if coder.transcodes else rows).astype(np.float64)
        np.testing.assert_allclose(norm, np.linalg.norm(y, axis=1), rtol=1e-5)
        expected = equation(all_arrays, [one.astype(np.float64) for one in all_rows], position)
        if position == 0:
            np.testing.assert_allclose(error_norm, np.linalg.norm(y - expected, axis=1), rtol=1e-4)
        else:
            assert np.isnan(error_norm).all()
        check = sums.add(encoder, torch.from_numpy(rows), torch.from_numpy(y.astype(np.float32)))
        fvu = ((y - expected)[:1024] ** 2).sum() / ((y[:1024] - y[:1024].mean(0)) ** 2).sum()
        assert check.value == pytest.approx(fvu, rel=1e-4)
        assert check.ok == (fvu <= 1) and f"layers 0 to {position}" in check.expected


def ids(folder: Path) -> list[str]:
    return [one.sae for one in expand_sae_arguments([str(folder)])]


def test_the_ids(tmp_path: Path) -> None:
    google = tmp_path / "google" / "gemma-scope-2-1b-pt"
    assert ids(write_coder(google, CLT)) == [f"{layer}-gemmascope-2-clt-width_96_l0_small" for layer in (0, 1, 2)]
    assert ids(write_coder(google, CROSSCODER)) == [
        f"{layer}-gemmascope-2-crosscoder-layer_1_2_5_width_96_l0_big" for layer in (1, 2, 5)
    ]
    assert ids(write_coder(tmp_path / "mine", CLT))[2] == "2-mine-clt-width_96_l0_small"
    one = google / CROSSCODER / "params_layer_2.safetensors"
    (found,) = expand_sae_arguments([f"five={one}"])
    assert (found.sae, str(found.site)) == ("five", "resid_post.5")
    assert (sae_sizes(found).width, sae_sizes(found).d_in) == (D_SAE, WIDTH)
    identity = load_sae(found).identity
    assert identity.release == "gemma-scope-2-1b-pt"
    assert identity.sae_id == f"{CROSSCODER}/params_layer_2"
    assert identity.architecture == "jumprelu crosscoder layer=5 of 1_2_5"
    with pytest.raises(InvalidInput, match="names 3 SAEs, and there is one id"):
        expand_sae_arguments([f"mine={google / CLT}"])


def refused(root: Path, arrays: Arrays, inner: str = CLT, position: int = 1) -> str:
    folder = write_layer(root, inner, position, arrays)
    with pytest.raises(InvalidInput) as caught:
        load(folder)
    return str(caught.value)


def changed(position: int = 1, **changes: Any) -> Arrays:
    return {name: array for name, array in (layer_arrays(position) | changes).items() if array is not None}


def with_decoder(layer: int, value: float) -> Any:
    decoder = layer_arrays(1)["w_dec"]
    decoder[3, layer, 4] = value
    return decoder


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        pytest.param(
            changed(w_dec=with_decoder(0, 0.5)),
            "w_dec writes layer number 0, below its own, which is number 1",
            id="not_causal",
        ),
        pytest.param(changed(w_dec=with_decoder(1, np.nan)), "w_dec has NaN", id="nan_in_its_own_decoder"),
        pytest.param(changed(w_dec=with_decoder(2, np.inf)), "w_dec has NaN or infinity", id="infinity_in_another"),
        pytest.param(
            changed(w_dec=layer_arrays(1)["w_dec"][:, 1]), "w_dec is (32, 10), where (d_sae, layer", id="flat"
        ),
        pytest.param(
            changed(w_dec=layer_arrays(1)["w_dec"][:, :1]), "w_dec has 1 layers, and it is number 1", id="few"
        ),
        pytest.param(changed(w_enc=np.ascontiguousarray(layer_arrays(1)["w_enc"].T)), "it is transposed", id="turned"),
        pytest.param(changed(threshold=-layer_arrays(1)["threshold"]), "thresholds are not positive", id="threshold"),
        pytest.param(changed(b_enc=None), "b_enc is missing", id="missing"),
        pytest.param(
            changed(affine_skip_connection=np.eye(10, dtype=np.float32)),
            "not part of the format",
            id="skip_unannounced",
        ),
    ],
)
def test_a_layer_that_is_wrong_is_refused_by_name(tmp_path: Path, arrays: Arrays, message: str) -> None:
    assert message in refused(tmp_path, arrays)


def test_another_axis_first_is_refused_where_the_path_says_how_many(tmp_path: Path) -> None:
    turned = np.ascontiguousarray(layer_arrays(1)["w_dec"].transpose(1, 0, 2))
    assert "w_dec has 32 layers, and it is number 1 of 3 by its path" in refused(
        tmp_path, changed(w_dec=turned), CROSSCODER
    )
    assert "w_dec is (3, 10), where b_enc and b_dec ask for (32, 10)" in refused(tmp_path, changed(w_dec=turned))


def test_what_training_left_below_is_nothing(tmp_path: Path) -> None:
    (coder,) = load(write_layer(tmp_path, CLT, 1, changed(w_dec=with_decoder(0, 1e-8))))
    assert coder.is_partial


@pytest.mark.parametrize(
    "inner",
    [
        "",
        "clt/other",
        "crosscoder/width_96_l0_big",
        "clt/layer_1_2_width_96_l0_big",
        "crosscoder/layer_1_width_96_l0_big",
    ],
    ids=["no_folder", "no_width", "crosscoder_without_layers", "clt_with_layers", "more_files_than_layers"],
)
def test_a_path_that_does_not_say_the_layer(tmp_path: Path, inner: str) -> None:
    folder = write_layer(tmp_path, inner, 1, layer_arrays(1))
    with pytest.raises(UnsupportedFormat, match="stands in its path and nowhere else"):
        expand_sae_arguments([str(folder)])


def test_a_layer_above_a_gap_is_not_proved(tmp_path: Path) -> None:
    encoders = [SaeEncoder(coder, "cpu") for coder in load(write_coder(tmp_path, CLT))]
    alone = SaeEncoder(load(write_coder(tmp_path / "other", CROSSCODER))[2], "cpu")
    found = coders_together([encoders[2], alone, encoders[0]])
    assert found == [([encoders[0]], [encoders[2]]), ([], [alone])]
    check = unproved(encoders[2], [encoders[0]])
    assert (check.ok, check.value) == (None, None)
    assert "sum over layers 0 to 2 of its coder, and number 1 was not asked for" in check.expected


def test_few_rows_prove_nothing(tmp_path: Path) -> None:
    encoder = SaeEncoder(load(write_coder(tmp_path, CROSSCODER))[0], "cpu")
    rows = torch.from_numpy(rows_of(0, 1023))
    assert LayerSums(1).add(encoder, rows, rows).ok is None
