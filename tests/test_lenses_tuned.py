"""Tuned lenses: the published folder and its equation, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from asking_support import SmallStore
from tuned_support import D_MODEL, DOC, FITTED, N_LAYERS, arrays_of, kit, numpy_logprobs, published

from actstore.api import Store
from actstore.errors import ActstoreError, InvalidInput, MissingInput, UnsupportedFormat
from actstore.lenses.tuned import TunedLens, translator_of, unembed_hash
from actstore.sites import parse_site

# The equation and its sites


@pytest.mark.parametrize("pt", [False, True], ids=["safetensors", "pt"])
def test_a_published_lens_is_the_equation_at_every_site(
    small: SmallStore, opened: Store, tmp_path: Path, pt: bool
) -> None:
    piece, arrays, truth = kit(opened.reader), arrays_of(), small.truth
    folder = published(tmp_path / "lens", piece, arrays, pt=pt)
    shown = opened.lens("tuned", doc=DOC, k=3, folder=folder, allow_pt=pt).df()
    assert sorted(shown.site.unique()) == sorted(["resid_pre.0", *(f"resid_post.{layer}" for layer in range(N_LAYERS))])
    here = truth.doc == DOC
    for site, number in [*FITTED, ("resid_post.5", None)]:
        rows = truth.matrix(f"sites/{site}")[here].astype(np.float64)
        if number is not None:
            rows = rows + rows @ arrays[f"{number}.weight"].T + arrays[f"{number}.bias"]
        expected = numpy_logprobs(piece, rows)
        of_site = shown[shown.site == site]
        np.testing.assert_array_equal(of_site.row.unique(), truth.rows[here])
        found = of_site.logprob.to_numpy().reshape(-1, 3)
        np.testing.assert_allclose(found, -np.sort(-expected, axis=1)[:, :3], atol=2e-3)
        ids = of_site.token_id.to_numpy().reshape(-1, 3)
        np.testing.assert_allclose(np.take_along_axis(expected, ids, 1), found, atol=2e-3)


def test_its_table_is_the_logit_lens_table_where_translators_are_zero(opened: Store, tmp_path: Path) -> None:
    zeros = {name: np.zeros_like(array) for name, array in arrays_of().items()}
    folder = published(tmp_path / "zero", kit(opened.reader), zeros)
    tuned = opened.lens("tuned", doc=DOC, k=2, sites="resid_post.*", folder=folder).arrow()
    logit = opened.lens("logit", doc=DOC, k=2, sites="resid_post.*").arrow()
    assert tuned.column_names == logit.column_names
    assert tuned.schema.types == logit.schema.types
    assert tuned.drop_columns(["logprob"]).equals(logit.drop_columns(["logprob"]))
    # The logit lens multiplies the rows of all sites at once: sums are then rounded otherwise.
    np.testing.assert_allclose(np.asarray(tuned["logprob"]), np.asarray(logit["logprob"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("site", "number"),
    [("resid_pre.0", 0), ("resid_pre.5", 5), ("resid_post.0", 1), ("resid_post.4", 5), ("resid_post.5", None)],
)
def test_a_translator_stands_before_its_layer(site: str, number: int | None) -> None:
    assert translator_of(parse_site(site), N_LAYERS) == number


@pytest.mark.parametrize("site", ["resid_mid.3", "attn_out.2", "final", "resid_pre.6", "resid_post.9"])
def test_other_sites_have_no_translator(site: str) -> None:
    with pytest.raises(InvalidInput, match="resid_pre and resid_post"):
        translator_of(parse_site(site), N_LAYERS)


@pytest.mark.parametrize("shape", [(1664, 128), (7, 300), (6, 400), (20, 20), (2, 3), (5000, 5)])
def test_the_published_hash_is_that_of_the_whole_matrix(shape: tuple[int, int]) -> None:
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert unembed_hash(weight) == hashlib.sha256(np.array_str(weight, precision=1).encode()).hexdigest()
    half = weight.astype(ml_dtypes.bfloat16)
    assert unembed_hash(half) == unembed_hash(half.astype(np.float32))


# Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"unembed_hash": "0" * 64}, "another model.*unembedding", id="other unembedding"),
        pytest.param({"num_hidden_layers": 7}, "another model.*7.*6", id="other depth"),
        pytest.param({"d_model": 64}, "another model.*64.*128", id="other width"),
        pytest.param(
            {"actstore": {"unembedding": "0" * 64, "sites": []}}, "another model.*0000", id="fitted elsewhere"
        ),
    ],
)
def test_a_lens_of_another_model_is_refused(
    opened: Store, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    sizes = {"n_layers": changes.get("num_hidden_layers", N_LAYERS), "d_model": changes.get("d_model", D_MODEL)}
    folder = published(tmp_path / "lens", kit(opened.reader), arrays_of(0, **sizes), **changes)
    with pytest.raises(InvalidInput, match=message):
        opened.lens("tuned", doc=DOC, folder=folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"5.weight": None}, "5.weight is missing.*", id="a matrix is missing"),
        pytest.param(
            {"5.weight": None, "5.bias": None}, r"translators \[5\] are missing", id="a translator is missing"
        ),
        pytest.param({"2.bias": np.zeros(5, np.float32)}, r"2.bias is \(5,\)", id="a bias of another width"),
        pytest.param({"6.bias": np.zeros(D_MODEL, np.float32)}, "6.bias is no translator", id="one too many"),
        pytest.param({"final.weight": np.zeros(3, np.float32)}, "final.weight is no translator", id="another key"),
        pytest.param({"3.bias": np.full(D_MODEL, np.nan, np.float32)}, "3.bias has NaN", id="NaN"),
    ],
)
def test_translators_that_do_not_fit_are_refused(
    opened: Store, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arrays = {name: array for name, array in (arrays_of() | change).items() if array is not None}
    folder = published(tmp_path / "lens", None, arrays)
    with pytest.raises(UnsupportedFormat, match=message):
        opened.lens("tuned", doc=DOC, folder=folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("[]", "not an object", id="a list"),
        pytest.param("{", "not JSON", id="cut short"),
        pytest.param('{"d_model": 128}', "num_hidden_layers is None", id="no layers"),
        pytest.param('{"d_model": -1, "num_hidden_layers": 6}', "d_model is -1", id="negative width"),
        pytest.param('{"d_model": true, "num_hidden_layers": 6}', "d_model is True", id="a width that is none"),
        pytest.param('{"d_model": 128, "num_hidden_layers": 6, "lens_type": "mlp"}', "'mlp'", id="another lens"),
        pytest.param('{"d_model": 128, "num_hidden_layers": 6, "rank": 8}', "rank is not known", id="unknown key"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = published(tmp_path / "lens")
    (folder / "config.json").write_text(text)
    with pytest.raises(UnsupportedFormat, match=message):
        TunedLens.open(folder)


def test_a_lens_without_biases_has_none(opened: Store, tmp_path: Path) -> None:
    weights = {name: array for name, array in arrays_of().items() if name.endswith("weight")}
    lens = TunedLens.open(published(tmp_path / "lens", None, weights, bias=False))
    ((_, translator),) = lens.translators([2])
    assert not translator.bias.any()
    np.testing.assert_array_equal(translator.weight, weights["2.weight"])
    with pytest.raises(UnsupportedFormat, match="bias is there"):
        TunedLens.open(published(tmp_path / "both", None, arrays_of(), bias=False))


def test_a_pickle_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    folder = published(tmp_path / "lens", pt=True)
    with pytest.raises(UnsupportedFormat, match=r"params\.pt is a pickle.*--allow-pt"):
        TunedLens.open(folder)
    lens = TunedLens.open(folder, allow_pt=True)
    for number, translator in lens.translators([*range(N_LAYERS)]):
        np.testing.assert_array_equal(translator.weight, arrays_of()[f"{number}.weight"])
        np.testing.assert_array_equal(translator.bias, arrays_of()[f"{number}.bias"])


def test_a_pickle_that_does_something_is_refused_and_does_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "done",))

    folder = published(tmp_path / "lens", pt=True)
    torch.save({"0.weight": Hostile()}, folder / "params.pt")
    with pytest.raises(UnsupportedFormat, match="more than tensors"):
        TunedLens.open(folder, allow_pt=True)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("missing", ["config.json", "params.safetensors"])
def test_a_folder_without_a_lens_is_refused(tmp_path: Path, missing: str) -> None:
    folder = published(tmp_path / "lens")
    (folder / missing).unlink()
    with pytest.raises(MissingInput):
        TunedLens.open(folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lens": "tuned"}, "folder of a tuned lens"),
        ({"lens": "logit", "folder": "x"}, "no lens with a folder 'logit'"),
        ({"lens": "attention"}, "no lens 'attention'"),
        ({"lens": "tuned", "folder": "nowhere"}, "no tuned lens in nowhere"),
    ],
    ids=["no folder", "a folder for logit", "no such lens", "no such folder"],
)
def test_lenses_that_cannot_be_are_refused(opened: Store, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ActstoreError, match=said):
        opened.lens(doc=DOC, **arguments)
