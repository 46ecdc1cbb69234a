"""The kit: what each piece holds, how pieces are written, shared, left out, added later, proved and removed."""

from __future__ import annotations

import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit_support import extract_family, weights_of
from store_support import copy_of_finished, reseal
from tiny_world import ATTENTION_SAE, RESIDUAL_SAE, extract, tiny_world

import actstore
from actstore import maintenance
from actstore.api import Store
from actstore.errors import MissingInput
from actstore.extraction import Request, plan_extraction
from actstore.info import describe
from actstore.sites import parse_site
from actstore.store import StoreReader, open_piece, write_piece
from actstore.store.bundle import open_bundle_file
from actstore.store.location import Location

SECOND: dict[str, Any] = {"dataset": None, "sites": [], "lens_k": 0, "lens_sites": [], "into": True}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("ACTSTORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kit"


def piece(reader: StoreReader, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return a piece's arrays and attributes."""
    found = reader.kit_piece(reader.kit_digest(name))
    return {key: np.asarray(array[...]).astype("f8") for key, array in found.arrays()}, dict(found.attrs)


# What is in it

OUTPUTS = {
    "gemma_2": ("self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj", "post_feedforward_layernorm"),
    "llama_with_biases_tied": ("self_attn.o_proj", None, "mlp.down_proj", None),
    "gpt_2": ("attn.c_proj", None, "mlp.c_proj", None),
    "pythia": ("attention.dense", None, "mlp.dense_4h_to_h", None),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_stored_heads_and_neurons_bring_what_lies_behind_them(tmp_path: Path, name: str) -> None:
    sites = ("z.1", "mlp_act.2", "attn_out_raw.0", "resid_post.2")
    model = extract_family(name, tmp_path / "a.act", sites, with_index=False)
    reader, weights = StoreReader(tmp_path / "a.act"), weights_of(model)
    layers = {"gpt_2": "transformer.h", "pythia": "gpt_neox.layers"}.get(name, "model.layers")
    attention, attention_norm, mlp, mlp_norm = OUTPUTS[name]
    for site, module, norm in (("z.1", attention, attention_norm), ("mlp_act.2", mlp, mlp_norm)):
        home, (arrays, attributes) = f"{layers}.{parse_site(site).layer}", piece(reader, f"output/{site}")
        weight = weights[f"{home}.{module}.weight"]
        expected = {"weight": weight if name == "gpt_2" else weight.T}
        if f"{home}.{module}.bias" in weights:
            expected["bias"] = weights[f"{home}.{module}.bias"]
        if norm:
            expected["gain"] = 1 + weights[f"{home}.{norm}.weight"]
            assert attributes["norm_epsilon"] == pytest.approx(model.config.rms_norm_eps)
        assert arrays.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_allclose(arrays[key], array, atol=1e-7)
        assert attributes["n_heads"] == 6
    arrays, _ = piece(reader, "output/attn_out_raw.0")
    assert set(arrays) == ({"gain"} if attention_norm else set())
    assert set(next(iter(reader.passes.values())).kit) == {"unembedding", *(f"output/{site}" for site in sites[:3])}


def test_an_saes_weights_are_kept_in_float32(tmp_path: Path) -> None:
    extract(tmp_path / "a.act", saes=[tiny_world().attention_sae, "neurons:mlp_act.1"], with_index=False)
    arrays, attributes = piece(StoreReader(tmp_path / "a.act"), f"sae/{ATTENTION_SAE}")
    with np.load(tiny_world().folder / "attention" / "params.npz", allow_pickle=False) as file:
        for ours, theirs in {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}.items():
            np.testing.assert_array_equal(arrays[ours], file[theirs])
        np.testing.assert_array_equal(arrays["threshold"], file["threshold"])
    said = {"k": None, "subtracts_b_dec": False, "normalisation": "none", "architecture": "jumprelu"}
    assert said.items() <= attributes.items()
    kit = next(iter(StoreReader(tmp_path / "a.act").passes.values())).kit
    assert set(kit) == {"unembedding", "output/z.0", "output/mlp_act.1", f"sae/{ATTENTION_SAE}"}


# Without it, and adding it


def direction(store: Store, sae: str = RESIDUAL_SAE) -> Any:
    return store.sql("SELECT feature_direction(?, 3)", [sae]).scalar()


def test_without_sae_weights_queries_say_so_and_the_same_command_adds_them(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    first = extract(out, sae_weights=False)
    with actstore.open(out) as store:
        assert not any(name.startswith("kit/sae") for name in describe(store).n_bytes)
        with pytest.raises(MissingInput, match=r"no sae/tiny-res.*`actstore extract`.*without --no-sae-weights"):
            direction(store)
        assert store.query("max_activating", {"sae": RESIDUAL_SAE, "feature": 3}) is not None

    second = extract(out)

    assert (second.pass_id, second.n_shards_made, second.complete) == (first.pass_id, 0, True)
    weights = tiny_world().folder / "residual" / "params.npz"
    with actstore.open(out) as store, np.load(weights, allow_pickle=False) as file:
        np.testing.assert_array_equal(direction(store), file["W_dec"][3])
    found = maintenance.verify(out)
    assert (found.faults, found.orphans) == ([], [])


def test_a_store_of_before_has_no_pieces_and_is_read_until_they_are_added(tmp_path: Path) -> None:
    store = copy_of_finished(tmp_path)

    def forget(body: dict[str, Any]) -> None:
        body["kit"] = {"unembedding": body["kit"]["unembedding"]}

    reseal(next(store.glob("passes/*/pass.json")), forget)
    maintenance.collect_garbage(store)
    with actstore.open(store) as opened:
        assert len(opened.sql("SELECT logit_lens('resid_post.1', row, 2) FROM tokens"))
        with pytest.raises(MissingInput, match="adds what the kit lacks"):
            direction(opened)

    extract(store)

    with actstore.open(store) as opened:
        assert len(direction(opened)) == 32


# Writing


def test_a_large_piece_is_written_a_chunk_at_a_time(tmp_path: Path) -> None:
    large = np.broadcast_to(np.arange(1024, dtype=np.float32), (40_000, 1024))  # 164 MB, and none of it in memory
    tracemalloc.start()
    digest = write_piece(tmp_path, {"large": (large, ("row", "column"))}, {"piece": "test"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 40e6
    found: Any = open_bundle_file(tmp_path / "kit" / f"{digest}.zip")["large"]
    np.testing.assert_array_equal(found[39_990:], large[39_990:])


@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (0, 3), (1, 3), (5000, 300), (2, 0)], ids=str)
def test_a_piece_is_read_as_it_was_written_and_named_by_its_bytes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    axes = ("a", "b")[: len(shape)]
    digests = {write_piece(tmp_path / name, {"x": (values, axes)}, {"n": 1}) for name in "ab"}
    assert len(digests) == 1
    found: Any = open_piece(Location.of(tmp_path / "a"), digests.pop())
    np.testing.assert_array_equal(np.asarray(found["x"]), values)
    assert found["x"].metadata.dimension_names == axes and found.attrs["n"] == 1


# Sharing


def arrays_of(number: int) -> dict[str, Any]:
    return {"x": (np.full((4, 3), number, dtype=np.float32), ("row", "column"))}


def test_stores_share_the_bytes_of_a_piece_until_the_last_of_them_is_gone(tmp_path: Path, cache: Path) -> None:
    digest = write_piece(tmp_path / "one", arrays_of(1), {})
    assert write_piece(tmp_path / "two", arrays_of(1), {}) == digest
    one, two = (tmp_path / name / "kit" / f"{digest}.zip" for name in ("one", "two"))
    assert one.samefile(two) and one.samefile(cache / one.name)

    shutil.rmtree(tmp_path / "one")
    write_piece(tmp_path / "three", arrays_of(2), {})
    assert (cache / two.name).exists() and two.exists()
    shutil.rmtree(tmp_path / "two")
    write_piece(tmp_path / "three", arrays_of(3), {})
    assert not (cache / two.name).exists(), "the cache alone must not keep bytes alive"
    assert not list(tmp_path.rglob("*.partial"))


def test_a_damaged_piece_is_not_shared(tmp_path: Path, cache: Path) -> None:
    digest = write_piece(tmp_path / "one", arrays_of(1), {})
    one = tmp_path / "one" / "kit" / f"{digest}.zip"
    one.write_bytes(b"damaged" + one.read_bytes())

    write_piece(tmp_path / "two", arrays_of(1), {})

    two = tmp_path / "two" / "kit" / one.name
    assert not two.samefile(one) and (cache / one.name).samefile(two)
    np.testing.assert_array_equal(np.asarray(open_bundle_file(two)["x"]), arrays_of(1)["x"][0])


def test_without_a_cache_that_can_be_written_every_store_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("ACTSTORE_CACHE", str(tmp_path / "file"))
    digests = [write_piece(tmp_path / name, arrays_of(1), {}) for name in ("one", "two")]
    one, two = (tmp_path / name / "kit" / f"{digests[0]}.zip" for name in ("one", "two"))
    assert not one.samefile(two) and one.read_bytes() == two.read_bytes()


# Proved, removed, planned


def test_a_dropped_saes_weights_go_and_those_of_others_stay(tmp_path: Path) -> None:
    store = copy_of_finished(tmp_path)
    extract(store, saes=[tiny_world().attention_sae], **SECOND)
    reader = StoreReader(store)
    gone, kept = (f"kit/{reader.kit_digest(f'sae/{sae}')}.zip" for sae in (RESIDUAL_SAE, ATTENTION_SAE))

    maintenance.drop(store, RESIDUAL_SAE)

    assert not (store / gone).exists() and (store / kept).exists()
    found = maintenance.verify(store)
    assert (found.faults, found.orphans) == ([], [])


def test_a_missing_or_changed_piece_is_a_fault(tmp_path: Path) -> None:
    store = copy_of_finished(tmp_path)
    reader = StoreReader(store)
    for name in (f"sae/{RESIDUAL_SAE}", "unembedding"):
        file = store / f"kit/{reader.kit_digest(name)}.zip"
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert [file.name in fault for fault in maintenance.verify(store).faults] == [True]
        file.unlink()
        assert [file.name in fault for fault in maintenance.verify(store).faults] == [True]
        file.write_bytes(data)


@pytest.mark.parametrize("sae_weights", [True, False])
def test_the_plan_knows_how_large_the_kit_will_be(tmp_path: Path, sae_weights: bool) -> None:
    asked: dict[str, Any] = {
        "sites": ("z.*", "mlp_act.1"),
        "saes": (tiny_world().residual_sae, tiny_world().attention_sae),
        "sae_weights": sae_weights,
    }
    extract(tmp_path / "a.act", lens_k=0, lens_sites=[], **asked, with_index=False)
    world = tiny_world()
    request = Request(
        model=str(world.model), dataset=str(world.dataset), out=tmp_path / "b.act", context=24, shard_rows=64, **asked
    )
    plan = plan_extraction(request)
    sizes = describe(Store(tmp_path / "a.act")).n_bytes
    pieces = {name: n_bytes for name, n_bytes in sizes.items() if name.startswith("kit/") and "vocabulary" not in name}
    assert sizes["kit"] == sum(n_bytes for name, n_bytes in sizes.items() if name.startswith("kit/"))
    overhead = 3000 * len(pieces)  # of the zip and its metadata
    assert plan.kit_bytes < sum(pieces.values()) < plan.kit_bytes * 1.1 + overhead
