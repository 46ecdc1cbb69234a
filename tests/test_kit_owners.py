"""Whose weights an SAE's are: those of the pass that has its firings, whatever another pass keeps under its id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from encode_support import encode
from store_support import copy_of_finished
from tiny_world import RESIDUAL_SAE, extract, tiny_world

import actstore
from actstore import maintenance
from actstore.api import Store
from actstore.errors import MissingInput
from actstore.store import StoreReader

FEATURE = 3


def direction(store: Store, sae: str = RESIDUAL_SAE) -> np.ndarray:
    return np.array(store.sql(f"SELECT feature_direction('{sae}', {FEATURE})").scalar(), dtype=np.float32)


def decoder(folder: Path) -> np.ndarray:
    with np.load(folder / "params.npz", allow_pickle=False) as file:
        return np.asarray(file["W_dec"][FEATURE], dtype=np.float32)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another SAE of the same site and shape: its features are numbered the other way round."""
    folder = tmp_path / "other"
    folder.mkdir()
    with np.load(tiny_world().folder / "residual" / "params.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    turned = {"W_enc": arrays["W_enc"][:, ::-1], "W_dec": arrays["W_dec"][::-1], "b_dec": arrays["b_dec"]}
    turned |= {name: arrays[name][::-1] for name in ("b_enc", "threshold")}
    np.savez(folder / "params.npz", allow_pickle=False, **turned)
    return folder


@pytest.fixture
def exchanged(tmp_path: Path) -> Path:
    """A store whose SAE was dropped; the pass that made it keeps its other artifacts, and the weights in its kit."""
    store = copy_of_finished(tmp_path)
    with actstore.open(store) as opened:
        np.testing.assert_array_equal(direction(opened), decoder(tiny_world().folder / "residual"))
    maintenance.drop(store, f"firings/{RESIDUAL_SAE}")
    return store


def test_an_id_that_was_another_saes_has_not_its_weights(exchanged: Path, other: Path) -> None:
    argument = f"{RESIDUAL_SAE}={other}@resid_post.1"
    encode(exchanged, [argument], sae_weights=False, with_index=True)

    with actstore.open(exchanged) as opened, pytest.raises(MissingInput, match=rf"no sae/{RESIDUAL_SAE}"):
        direction(opened)

    encode(exchanged, [argument])
    with actstore.open(exchanged) as opened:
        np.testing.assert_array_equal(direction(opened), decoder(other))
    assert maintenance.verify(exchanged).faults == []


def test_an_sae_that_was_dropped_has_no_weights(exchanged: Path) -> None:
    reader = StoreReader(exchanged)

    assert not reader.kit.has(f"sae/{RESIDUAL_SAE}")
    with pytest.raises(MissingInput):
        reader.kit_digest(f"sae/{RESIDUAL_SAE}")


def test_what_follows_from_the_model_is_any_passs(exchanged: Path) -> None:
    """Of a pass that has no unembedding of its own another's is read: it is the same model's."""
    before = StoreReader(exchanged).kit_digest("unembedding", "sites/resid_post.1")
    extract(exchanged, dataset=None, sites=[], saes=[tiny_world().attention_sae], lens_k=0, lens_sites=[], into=True)

    reader = StoreReader(exchanged)

    assert reader.kit_digest("unembedding", "corpus/tokens") == before
    assert reader.kit.has("output/z.0")
