"""Folders that sae-lens itself saves are read as sae-lens itself computes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch

from actstore.errors import UnsupportedFormat
from actstore.saes import SaeEncoder, SparseCoder, expand_sae_arguments, load_sae, registry
from actstore.saes.rules import scale_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of its own imports
    sae_lens: Any = pytest.importorskip("sae_lens")
    transcoders: Any = pytest.importorskip("sae_lens.saes.transcoder")

torch.set_num_threads(1)

D_IN, D_OUT, D_SAE, K, N_HEADS = 12, 8, 48, 5, 3
METADATA = {"model_name": "gemma-2-2b", "hook_name": "blocks.3.hook_resid_post"}
TRANSCODES = METADATA | {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}


def rows(width: int = D_IN) -> torch.Tensor:
    """Return rows with a mean, one of them large and one of zeros."""
    made = torch.randn((64, width), generator=torch.Generator().manual_seed(5)) * 2 + 0.5
    made[7] *= 40
    made[3] = 0
    return made


def made(name: str, *, metadata: dict[str, Any] = METADATA, **options: Any) -> Any:
    """Return one of sae-lens' coders with random weights, decoder rows of different norms, positive thresholds."""
    home = transcoders if "Transcoder" in name else sae_lens
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "metadata": sae_lens.saes.sae.SAEMetadata(**metadata)}
    coder = getattr(home, name)(getattr(home, f"{name}Config")(**sizes | options))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for key, parameter in coder.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / (4 if key in ("b_enc", "b_dec") else 1))
            if "threshold" in key:
                parameter.abs_().add_(0.2)
    return coder.eval()


def read(folder: Path, site: str = "") -> SparseCoder:
    return load_sae(expand_sae_arguments([f"{folder}{site}"])[0])


def computed(coder: SparseCoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (row, feature) and reconstructions (row, d_out) as actstore computes them."""
    encoder = SaeEncoder(coder, "cpu")
    targets = torch.zeros((len(x), coder.d_out)) if coder.transcodes else None
    tile = encoder.encode(x, targets=targets)
    features = torch.zeros((len(x), coder.d_sae))
    features[torch.arange(len(x)).repeat_interleave(tile.counts), tile.features.long()] = tile.activations
    decoded = encoder.decode(features, x)
    scale = scale_of(x, coder.normalisation)
    decoded = decoded if scale is None else scale.undo(decoded)
    missed = (decoded if targets is None else decoded - targets) - (x if targets is None else 0)
    torch.testing.assert_close(tile.reconstruction[:, 2], missed.norm(dim=1), rtol=1e-4, atol=1e-4)
    return features, decoded


def expect(reference: Any, coder: SparseCoder, x: torch.Tensor | None = None) -> None:
    """Hold values against sae-lens' within the rounding of float32, and what fires exactly."""
    x = rows() if x is None else x
    with torch.no_grad():
        features = reference.encode(x)
        decoded = reference.forward(x)
    found, reconstruction = computed(coder, x)
    assert 0.01 < (features > 0).float().mean() < 0.9, "some fire and some do not"
    assert torch.equal(found > 0, features > 0)
    torch.testing.assert_close(found, features, rtol=1e-5, atol=1e-5 * float(features.abs().max()))
    torch.testing.assert_close(reconstruction, decoded, rtol=1e-5, atol=1e-5 * float(decoded.abs().max()))


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("subtracts", [True, False], ids=["b_dec_subtracted", "as_it_is"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("StandardSAE", {}),
        ("JumpReLUSAE", {}),
        ("GatedSAE", {}),
        ("TopKSAE", {"k": K}),
        ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    ],
    ids=["standard", "jumprelu", "gated", "topk", "topk_by_decoder_norm"],
)
def test_every_architecture(
    tmp_path: Path, name: str, options: dict[str, Any], subtracts: bool, normalisation: str
) -> None:
    coder = made(name, apply_b_dec_to_input=subtracts, normalize_activations=normalisation, **options)
    coder.save_model(tmp_path / "sae")
    x = rows()
    if normalisation == "constant_norm_rescale":
        x = x[x.norm(dim=1) > 0]  # a row of zeros has no direction, and is NaN there
    expect(sae_lens.SAE.load_from_disk(tmp_path / "sae"), read(tmp_path / "sae"), x)


@pytest.mark.parametrize("has_hook_z", [True, False])
def test_heads_are_flattened_one_after_the_other(tmp_path: Path, has_hook_z: bool) -> None:
    metadata = METADATA | {"hook_name": "blocks.3.attn.hook_z"}
    coder = made("JumpReLUSAE", metadata=metadata, reshape_activations="hook_z" if has_hook_z else "none")
    coder.save_model(tmp_path / "sae")
    found = read(tmp_path / "sae")
    assert found.identity.site == "z.3"
    apart = rows().reshape(-1, 1, N_HEADS, D_IN // N_HEADS)  # row, position, head, number
    with torch.no_grad():
        expected = coder.encode(apart if has_hook_z else apart.flatten(2)).flatten(0, 1)
    features, _ = computed(found, rows())
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"])
@pytest.mark.parametrize("d_out", [D_IN, D_OUT])
def test_transcoders(tmp_path: Path, name: str, d_out: int) -> None:
    coder = made(name, metadata=TRANSCODES, d_out=d_out, apply_b_dec_to_input=False)
    coder.save_model(tmp_path / "sae")
    found = read(tmp_path / "sae")
    assert (found.identity.site, found.identity.write_site) == ("ln2_normalized.3", "mlp_out.3")
    expect(coder, found)


@pytest.mark.parametrize("rescales", [True, False])
@pytest.mark.parametrize("name", ["BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE"])
def test_what_was_trained_by_the_batch_is_saved_with_thresholds(tmp_path: Path, name: str, rescales: bool) -> None:
    widths: dict[str, Any] = {"matryoshka_widths": [16, D_SAE]} if name.startswith("Matryoshka") else {}
    training = made(name, k=float(K), rescale_acts_by_decoder_norm=rescales, **widths)
    training.topk_threshold.fill_(1.5)
    training.save_inference_model(tmp_path / "sae")
    found = read(tmp_path / "sae")
    assert found.identity.architecture == "jumprelu x-b_dec"
    expect(sae_lens.SAE.load_from_disk(tmp_path / "sae"), found)


TRAINING: dict[str, dict[str, Any]] = {
    "StandardTrainingSAE": {},
    "JumpReLUTrainingSAE": {},
    "GatedTrainingSAE": {},
    "TopKTrainingSAE": {"k": K},
    "BatchTopKTrainingSAE": {"k": float(K)},
    "MatryoshkaBatchTopKTrainingSAE": {"k": float(K), "matryoshka_widths": [16, D_SAE]},
}


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    training = made(name, **TRAINING[name])
    training.save_model(tmp_path / "checkpoint")
    with pytest.raises(UnsupportedFormat, match=r"could change the equation|architecture is"):
        read(tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["StandardTrainingSAE", "JumpReLUTrainingSAE", "GatedTrainingSAE", "TopKTrainingSAE"])
def test_what_is_saved_after_training(tmp_path: Path, name: str) -> None:
    training = made(name, **TRAINING[name])
    training.save_inference_model(tmp_path / "sae")
    expect(sae_lens.SAE.load_from_disk(tmp_path / "sae"), read(tmp_path / "sae"))


SCALED = [("StandardSAE", {}), ("JumpReLUSAE", {}), ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True})]


@pytest.mark.parametrize(("name", "options"), SCALED)
def test_a_scale_of_the_registry_is_folded_as_from_pretrained_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    coder = made(name, normalize_activations="expected_average_only_in", **options)
    folder = tmp_path / "models--own--repo" / "snapshots" / ("0" * 40) / "sae"
    coder.save_model(folder)
    (tmp_path / "models--own--repo" / "refs").mkdir()
    (tmp_path / "models--own--repo" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    entry = {"repo_id": "own/repo", "model": "m", "saes": [{"id": "one", "path": "sae", "norm_scaling_factor": 2.5}]}
    monkeypatch.setattr(registry, "_read", lambda path: {"release": entry})
    with pytest.raises(UnsupportedFormat, match="the scale is not in the folder"):
        read(folder)
    coder.fold_activation_norm_scaling_factor(2.5)
    expect(coder, load_sae(expand_sae_arguments(["saelens:release/one"])[0]))


def test_what_is_folded_before_it_is_saved(tmp_path: Path) -> None:
    coder = made("JumpReLUSAE", normalize_activations="expected_average_only_in")
    coder.fold_activation_norm_scaling_factor(2.5)
    coder.save_model(tmp_path / "sae")
    expect(coder, read(tmp_path / "sae"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_weights_are_widened(tmp_path: Path, dtype: str) -> None:
    made("JumpReLUSAE").to(getattr(torch, dtype)).save_model(tmp_path / "sae")
    found = read(tmp_path / "sae")
    expect(sae_lens.SAE.load_from_disk(tmp_path / "sae", dtype="float32"), found)
    assert found.w_enc.dtype == np.float32
