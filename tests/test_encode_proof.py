"""What encoding keeps in the kit, and the proof that a coder belongs to its stored site."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from encode_support import coders, copy_of_sites, encode, health, stored
from store_support import reseal
from tiny_world import RESIDUAL_SAE, WORDS, tiny_world
from transcoder_support import unnamed

import actstore
from actstore import maintenance
from actstore.errors import Unhealthy
from actstore.store import StoreReader


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of a store with sites alone, to be changed."""
    return copy_of_sites(tmp_path)


# The kit


def test_weights_left_out_can_be_added(copied: Path) -> None:
    name = f"sae/{RESIDUAL_SAE}"
    first = encode(copied, [tiny_world().residual_sae], sae_weights=False)
    assert name not in StoreReader(copied).passes[first.pass_id].kit
    encode(copied, [tiny_world().residual_sae])
    assert name in StoreReader(copied).passes[first.pass_id].kit
    assert maintenance.verify(copied).ok


def test_feature_logits_that_the_kit_cannot_give_are_left_out_and_named(copied: Path) -> None:
    (site_pass,) = StoreReader(copied).passes
    reseal(copied / "passes" / site_pass / "pass.json", lambda body: body["kit"].pop("output/z.0"))
    encode(copied, coders()[:2])
    reader = StoreReader(copied)
    assert reader.feature_logits("tiny-att") is None and reader.feature_logits(RESIDUAL_SAE) is not None
    check = health(copied)["sae_feature_logits", "tiny-att"]
    assert check["ok"] is None and "output/z.0" in check["expected"]


# The proof


@pytest.fixture(scope="module")
def proving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with rows enough for a proof, and three sites of one width."""
    random = np.random.default_rng(8)
    texts = [" ".join(random.choice(WORDS, size=20)) for _ in range(90)]
    sites = ["mlp_out.1", "resid_post.1", "attn_out.1"]
    return stored(tmp_path_factory.mktemp("proof") / "a.act", dataset=texts, sites=sites, shard_rows=4096)


@pytest.fixture(scope="module")
def mlp_coder(proving: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coder of the principal directions of mlp_out.1, both ways: it explains that site and no other."""
    with actstore.open(proving) as store:
        rows = store["mlp_out.1"][:].astype(np.float64)
    mean = rows.mean(0)
    directions = np.linalg.svd(rows - mean, full_matrices=False)[2][:10]
    encoder = np.concatenate([directions, -directions])
    arrays = {
        "W_enc": encoder.T,
        "W_dec": encoder,
        "b_enc": -encoder @ mean,
        "b_dec": mean,
        "threshold": np.full(len(encoder), 1e-4),
    }
    floats = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
    return unnamed(tmp_path_factory.mktemp("coder") / "mlp", floats)


def test_a_better_stored_site_is_named(proving: Path, mlp_coder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(proving, tmp_path / "copy.act"))
    with pytest.raises(Unhealthy, match=r"lowest of all stored sites by 5 %; mlp_out.1 explains it better"):
        encode(out, [f"mlp={mlp_coder}@resid_post.1"], allow_unhealthy=False)
    assert len(StoreReader(out).passes) == 1, "nothing was begun"
    encode(out, [f"mlp={mlp_coder}@mlp_out.1"], allow_unhealthy=False)
    compared = {subject: row["ok"] for (name, subject), row in health(out).items() if name == "sae_site"}
    assert compared == {f"mlp @ {site}": True for site in ("mlp_out.1", "resid_post.1", "attn_out.1")}


def test_without_a_rival_nothing_is_proved(proving: Path, mlp_coder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(proving, tmp_path / "copy.act"))
    for site in ("resid_post.1", "attn_out.1"):
        maintenance.drop(out, f"sites/{site}")
    encode(out, [f"mlp={mlp_coder}@mlp_out.1"], allow_unhealthy=False)
    check = health(out)["sae_site", "mlp @ mlp_out.1"]
    assert check["ok"] is None and "not proved: of all stored sites no other" in check["expected"]
    assert health(out)["sae_fvu", "mlp"]["ok"] is True
