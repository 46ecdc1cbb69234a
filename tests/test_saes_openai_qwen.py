"""OpenAI's `autoencoders/8.pt` and Qwen-Scope's `layer7.sae.pt`: the published equations, opened only where allowed."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import numpy.typing as npt
import pytest
import torch
from saes_support import Arrays, plain_tensors

from actstore.errors import ActstoreError, InvalidInput, UnsupportedFormat
from actstore.saes import SaeEncoder, SparseCoder, expand_sae_arguments, load_sae, sae_sizes

torch.set_num_threads(1)

Matrix = npt.NDArray[np.float64]
ROWS: Matrix = np.random.default_rng(5).normal(size=(64, 10)) * 2 + 0.5
PLAIN: Arrays = {name: array.astype(np.float64) for name, array in plain_tensors().items()}
K = 6
QWEN = "SAE-Res-Qwen3-1.7B-Base-W1K-L0_6"


def openai_state(activation: Any = "TopK", **changes: Any) -> dict[str, Any]:
    """Return a state as its makers' class gives it: tensors, statistics of the training, and its activation."""
    plain = {name: torch.from_numpy(array) for name, array in plain_tensors().items()}
    tensors = {
        "pre_bias": plain["b_dec"],
        "latent_bias": plain["b_enc"],
        "stats_last_nonzero": torch.arange(48),
        "latents_activation_frequency": torch.ones(48),
        "latents_mean_square": torch.zeros(48),
        "encoder.weight": plain["W_enc"].T.clone(),
        "decoder.weight": plain["W_dec"].T.clone(),
    }
    inner = OrderedDict(k=K, postact_fn="ReLU") if activation == "TopK" else OrderedDict()
    values = {} if activation is None else {"activation": activation, "activation_state_dict": inner}
    return OrderedDict(tensors | values | changes)


def write_openai(root: Path, location: str = "resid_post_mlp_v5_32k", file: str = "8.pt", state: Any = None) -> Path:
    path = root / location / "autoencoders" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(openai_state() if state is None else state, path)
    return path


def qwen_tensors(d_sae: int = 1024) -> dict[str, torch.Tensor]:
    plain = {name: torch.from_numpy(array) for name, array in plain_tensors(d_sae=d_sae).items()}
    return {**plain, "W_enc": plain["W_enc"].T.clone(), "W_dec": plain["W_dec"].T.clone()}


def write_qwen(root: Path, repository: str = QWEN, layer: int = 7) -> Path:
    path = root / repository / f"layer{layer}.sae.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(qwen_tensors(), path)
    return path


def load(source: object) -> SparseCoder:
    (resolved,) = expand_sae_arguments([str(source)], allow_pt=True)
    return load_sae(resolved)


def largest(before: Matrix, k: int) -> Matrix:
    """Return the k largest of each row where they are positive, a row after the other."""
    features = np.zeros_like(before)
    for row, values in enumerate(before):
        chosen = np.argsort(-values)[:k]
        features[row, chosen] = np.maximum(values[chosen], 0)
    return features


def check(coder: SparseCoder, features: Matrix, decoded: Matrix) -> None:
    """Hold what the coder makes of ROWS against the equations."""
    tile = SaeEncoder(coder, "cpu").encode(torch.from_numpy(ROWS))
    found = np.zeros(features.shape, np.float32)
    found[np.repeat(np.arange(64), tile.counts.numpy()), tile.features.numpy()] = tile.activations.numpy()
    assert features.any(1).all()
    np.testing.assert_allclose(found, features, rtol=2e-4, atol=2e-5)
    error = np.linalg.norm(ROWS - decoded, axis=1)
    np.testing.assert_allclose(tile.reconstruction[:, 2].numpy(), error, rtol=1e-4, atol=1e-5)


def test_openais_topk_normalises_each_row_first(tmp_path: Path) -> None:
    coder = load(write_openai(tmp_path))
    mean, deviation = ROWS.mean(1, keepdims=True), ROWS.std(1, ddof=1, keepdims=True)
    x = (ROWS - mean) / (deviation + 1e-5)
    features = largest((x - PLAIN["b_dec"]) @ PLAIN["W_enc"] + PLAIN["b_enc"], K)
    check(coder, features, (features @ PLAIN["W_dec"] + PLAIN["b_dec"]) * deviation + mean)
    assert (coder.k, coder.identity.architecture) == (K, "topk k=6 x-b_dec layer_norm")
    assert coder.identity.declared_l0 == K


@pytest.mark.parametrize("activation", ["ReLU", None], ids=["named", "not_named"])
def test_openais_relu_takes_rows_as_they_are(tmp_path: Path, activation: str | None) -> None:
    coder = load(write_openai(tmp_path, "mlp_post_act", "3.pt", openai_state(activation)))
    features = np.maximum((ROWS - PLAIN["b_dec"]) @ PLAIN["W_enc"] + PLAIN["b_enc"], 0)
    check(coder, features, features @ PLAIN["W_dec"] + PLAIN["b_dec"])
    assert (coder.k, coder.identity.architecture, coder.identity.site) == (None, "standard x-b_dec", "mlp_act.3")


def test_qwens_topk_subtracts_nothing(tmp_path: Path) -> None:
    plain = {name: array.astype(np.float64) for name, array in plain_tensors(d_sae=1024).items()}
    coder = load(write_qwen(tmp_path))
    features = largest(ROWS @ plain["W_enc"] + plain["b_enc"], K)
    check(coder, features, features @ plain["W_dec"] + plain["b_dec"])
    assert (coder.k, coder.identity.architecture, coder.identity.declared_l0) == (K, "topk k=6", K)


@pytest.mark.parametrize(
    ("location", "site"),
    [
        ("resid_delta_attn_v5_32k", "attn_out.8"),
        ("resid_delta_mlp_v5_128k", "mlp_out.8"),
        ("resid_delta_mlp", "mlp_out.8"),
        ("resid_post_attn_v5_32k", "resid_mid.8"),
        ("resid_post_mlp_v5_32k", "resid_post.8"),
        ("mlp_post_act_v4", "mlp_act.8"),
    ],
)
def test_openais_location_is_a_site(tmp_path: Path, location: str, site: str) -> None:
    path = write_openai(tmp_path, location)
    assert load(path).identity.site == site
    assert load(path.parents[1]).identity.sae == f"{site}-{location}"


@pytest.mark.parametrize(("location", "file"), [("mine", "8.pt"), ("resid_post_mlp_v5_32k", "8_final.pt")])
def test_a_path_that_says_no_site_needs_one(tmp_path: Path, location: str, file: str) -> None:
    path = write_openai(tmp_path, location, file)
    with pytest.raises(InvalidInput, match="Nothing says which site"):
        load(path)
    assert load(f"{path}@resid_post.2").identity.site == "resid_post.2"


def test_a_location_contradicts_another_site(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"reads resid_post\.8 by its path or file, and resid_mid\.8"):
        load(f"{write_openai(tmp_path)}@resid_mid.8")


@pytest.mark.parametrize("source", ["", QWEN, f"{QWEN}/layer*.sae.pt", f"{QWEN}/*.pt", "*"])
def test_all_layers_of_a_folder_in_their_order(tmp_path: Path, source: str) -> None:
    for layer in (10, 2, 0):
        write_qwen(tmp_path, layer=layer)
    found = expand_sae_arguments([str(tmp_path / source)], allow_pt=True)
    assert [str(sae.site) for sae in found] == ["resid_post.0", "resid_post.2", "resid_post.10"]
    assert [sae.sae for sae in found] == [f"resid_post.{layer}-{QWEN}" for layer in (0, 2, 10)]
    assert load_sae(found[2]).identity.width == 1024


@pytest.mark.parametrize("source", ["*/autoencoders/*.pt", "resid_*", "*/autoencoders/[18]*.pt"])
def test_several_locations_of_openai(tmp_path: Path, source: str) -> None:
    for location in ("resid_post_mlp_v5_32k", "resid_delta_mlp_v5_32k"):
        for file in ("8.pt", "11.pt"):
            write_openai(tmp_path, location, file)
    found = expand_sae_arguments([f"{tmp_path}/{source}"], allow_pt=True)
    assert [str(sae.site) for sae in found] == ["mlp_out.8", "mlp_out.11", "resid_post.8", "resid_post.11"]


def test_k_that_the_path_does_not_say_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match=r"as its path describes it: how many features.*SAE-Res-…-W32K-L0_50"):
        load(write_qwen(tmp_path, "downloads"))


def test_a_width_that_the_path_says_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="it has 1,024 features, and 32,768 by its path"):
        load(write_qwen(tmp_path, "SAE-Res-Qwen3-8B-Base-W32K-L0_50"))


@pytest.mark.parametrize("write", [write_openai, write_qwen])
def test_nothing_is_opened_unasked(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path)
    path.write_bytes(b"not opened")
    for source in (path, tmp_path):
        with pytest.raises(UnsupportedFormat, match=r"\.pt, a pickle: a program.*--allow-pt"):
            expand_sae_arguments([str(source)])


class Canary:
    """Executes when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("key", ["activation", "activation_state_dict", "pre_bias"])
def test_code_in_a_file_never_runs(tmp_path: Path, key: str) -> None:
    canary = tmp_path / "canary"
    path = write_openai(tmp_path, state=openai_state(**{key: Canary(canary)}))
    with pytest.raises(InvalidInput, match="it holds more than tensors"):
        load(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param({"activation": "Identity"}, UnsupportedFormat, 'activation is "Identity"', id="activation"),
        pytest.param(
            {"activation_state_dict": {"k": 6, "postact_fn": "Identity"}},
            UnsupportedFormat,
            'postact_fn is "Identity"',
            id="no_relu",
        ),
        pytest.param({"activation_state_dict": {}}, UnsupportedFormat, "k is missing", id="no_k"),
        pytest.param({"activation_state_dict": 6}, UnsupportedFormat, "not an object", id="no_dict"),
        pytest.param({"activation": torch.zeros(3)}, InvalidInput, "more than text and numbers", id="tensor"),
        pytest.param({"activation_state_dict": {"k": 49}}, InvalidInput, "k is 49, of 48", id="large_k"),
        pytest.param({"extra": "text"}, InvalidInput, "extra is no tensor", id="unknown_value"),
        pytest.param({"scale": torch.ones(3)}, InvalidInput, "scale is not part of the format", id="unknown_tensor"),
        pytest.param({"pre_bias": torch.full((10,), torch.nan)}, InvalidInput, "b_dec has NaN", id="nan"),
        pytest.param({"decoder.weight": torch.ones(48, 10)}, InvalidInput, "transposed", id="transposed"),
    ],
)
def test_a_state_that_cannot_be_trusted_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[ActstoreError], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(write_openai(tmp_path, state=openai_state(**changes)))


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = write_openai(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InvalidInput, match=r"autoencoders/8\.pt cannot be used: it is not what torch\.save writes"):
        load(path)


@pytest.mark.parametrize(
    ("source", "layers", "is_listed"),
    [("layer*.sae.pt", [2, 7], True), ("*.pt", [2, 7], True), ("layer7.sae.pt", [7], False)],
)
def test_on_the_hub_a_file_is_one_sae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, layers: list[int], is_listed: bool
) -> None:
    paths = [write_qwen(tmp_path / "snapshots", "commit", layer) for layer in (7, 2)]
    asked: list[str] = []
    listing = [*(path.name for path in paths), "README.md", "trainer/optimizer.pt"]

    def list_files(repository: str) -> list[str]:
        asked.append(repository)
        return listing

    def download(_: str, path: str) -> str:
        asked.append(path)
        return str(paths[0].with_name(path))

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = expand_sae_arguments([f"Qwen/{QWEN}/{source}"], allow_pt=True)
    assert [str(sae.site) for sae in found] == [f"resid_post.{layer}" for layer in layers]
    assert [sae_sizes(sae).width for sae in found] == [1024] * len(layers)
    assert asked == [f"Qwen/{QWEN}"] * is_listed  # sizes are known without weights
    identity = load_sae(found[-1]).identity
    assert (identity.release, identity.sae_id, identity.revision) == (f"Qwen/{QWEN}", "layer7.sae.pt", "commit")
    assert asked[-1] == "layer7.sae.pt"


@pytest.mark.parametrize("source", ["resid_post_mlp_v5_32k", "*/autoencoders/*.pt"])
def test_openais_layout_mirrored_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    root = tmp_path / "snapshots" / "commit"
    listing = [write_openai(root, file=file).relative_to(root).as_posix() for file in ("8.pt", "11.pt")]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda _: listing)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda _, path: str(root / path))
    found = expand_sae_arguments([f"own/mirror/{source}"], allow_pt=True)
    assert [str(sae.site) for sae in found] == ["resid_post.8", "resid_post.11"]
    assert load_sae(found[1]).identity.sae_id == "resid_post_mlp_v5_32k/autoencoders/11.pt"
