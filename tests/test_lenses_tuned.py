"""Tuned lenses: the published folder and its equation, fitting one from a store, and what is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from asking_support import SmallStore
from click.testing import CliRunner
from extraction_support import log_softmax
from safetensors.numpy import load_file, save_file

from actstore import maintenance
from actstore.api import Store
from actstore.cli import main
from actstore.errors import ActstoreError, InvalidInput, MissingInput, UnknownName, UnsupportedFormat
from actstore.lens_fitting import FittedSite, fit_lens, is_held_out
from actstore.lenses.fitting import FitOptions, Rows, _logits, fit_translator, mean_kl
from actstore.lenses.tuned import TunedLens, translator_of, unembed_hash
from actstore.models import logits, unembedding_of
from actstore.sites import parse_site
from actstore.store import StoreReader

D_MODEL, N_LAYERS, DOC = 128, 6, 7
FITTED = [("resid_pre.0", 0), *((f"resid_post.{layer}", layer + 1) for layer in range(N_LAYERS - 1))]


def kit(reader: StoreReader) -> Any:
    return reader.kit_piece(reader.kit_digest("unembedding", "sites/resid_post.5"))


def numpy_logprobs(piece: Any, rows: np.ndarray) -> np.ndarray:
    """Return the model's log-probabilities of residual rows, from the page docs/format.md: (row, token)."""
    exact = rows.astype(np.float64)
    normed = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + piece.attrs["norm_epsilon"])
    raw = normed * piece["gain"][:] @ piece["weight"][:].astype(np.float64).T
    return log_softmax(30 * np.tanh(raw / 30))


def arrays_of(seed: int = 0, n_layers: int = N_LAYERS, d_model: int = D_MODEL) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for number in range(n_layers):
        arrays[f"{number}.weight"] = (random.normal(size=(d_model, d_model)) * 0.05).astype(np.float32)
        arrays[f"{number}.bias"] = random.normal(size=d_model).astype(np.float32)
    return arrays


def published(
    folder: Path, piece: Any = None, arrays: dict[str, np.ndarray] | None = None, *, pt: bool = False, **changes: Any
) -> Path:
    """Write a folder as the published lenses are, and return it; changes are those of its configuration."""
    config = {
        "base_model_name_or_path": "model",
        "d_model": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "bias": True,
        "base_model_revision": "main",
        "unembed_hash": None if piece is None else unembed_hash(piece["weight"]),
        "lens_type": "linear_tuned_lens",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    arrays = arrays_of() if arrays is None else arrays
    if pt:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / "params.pt")
    else:
        save_file(arrays, folder / "params.safetensors")
    return folder


@pytest.fixture(scope="module")
def fitted(small: SmallStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[FittedSite]]:
    """A lens of the small store, fitted once: a few seconds."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lens") / "mine"
    with small.open() as store:
        found = fit_lens(
            store, folder, n_steps=30, evaluate_every=10, batch_rows=300, held_out=0.2, seed=3, device="cpu"
        )
    return folder, found


def test_a_lens_is_never_written_over(small: SmallStore, fitted: tuple[Path, list[FittedSite]]) -> None:
    with small.open() as store, pytest.raises(InvalidInput, match=r"There is a lens in .* already"):
        fit_lens(store, fitted[0], n_steps=1)


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


# Fitting


def test_a_fitted_lens_beats_the_logit_lens_on_documents_it_never_saw(
    small: SmallStore, opened: Store, fitted: tuple[Path, list[FittedSite]]
) -> None:
    folder, found = fitted
    truth, piece = small.truth, kit(opened.reader)
    assert [(one.site, one.translator) for one in found] == FITTED
    arrays = load_file(folder / "params.safetensors")
    held = truth.plain & is_held_out(truth.doc, 0.2, 3)
    assert 0.02 < held.mean() < 0.5
    model = numpy_logprobs(piece, truth.matrix("sites/resid_post.5")[held])
    for one in found:
        rows = truth.matrix(f"sites/{one.site}")[held].astype(np.float64)
        tuned = rows + rows @ arrays[f"{one.translator}.weight"].T + arrays[f"{one.translator}.bias"]
        before, after = (
            float((np.exp(model) * (model - numpy_logprobs(piece, read))).sum(1).mean()) for read in (rows, tuned)
        )
        assert after < before
        assert (one.kl_logit_lens, one.kl_tuned_lens) == pytest.approx((before, after), rel=1e-3, abs=1e-5)


def test_a_fitted_folder_has_the_published_layout_and_says_what_it_was_fitted_to(
    opened: Store, fitted: tuple[Path, list[FittedSite]]
) -> None:
    folder, found = fitted
    config = json.loads((folder / "config.json").read_text())
    ours = config.pop("actstore")
    assert config == {
        "base_model_name_or_path": "model",
        "base_model_revision": None,
        "bias": True,
        "d_model": D_MODEL,
        "lens_type": "linear_tuned_lens",
        "num_hidden_layers": N_LAYERS,
        "unembed_hash": unembed_hash(kit(opened.reader)["weight"]),
    }
    assert ours["unembedding"] == opened.reader.kit_digest("unembedding", "sites/resid_post.5")
    assert ours["sites"] == [asdict(one) for one in found]
    arrays = load_file(folder / "params.safetensors")
    assert sorted(arrays) == sorted(arrays_of())
    assert all(array.shape == arrays_of()[name].shape for name, array in arrays.items())
    assert set(opened.lens("tuned", doc=DOC, folder=folder).df().site) == {*dict(FITTED), "resid_post.5"}


def test_the_same_seed_gives_the_same_file_and_another_one_another(small: SmallStore, tmp_path: Path) -> None:
    def bytes_of(name: str, seed: int) -> bytes:
        with small.open() as store:
            options: dict[str, Any] = {"sites": ["resid_post.2"], "n_steps": 5, "batch_rows": 200, "device": "cpu"}
            fit_lens(store, tmp_path / name, seed=seed, **options)
        return (tmp_path / name / "params.safetensors").read_bytes()

    assert bytes_of("first", 1) == bytes_of("again", 1) != bytes_of("other", 2)


def test_a_lens_of_some_sites_reads_these_and_no_others(opened: Store, tmp_path: Path) -> None:
    fit_lens(opened, tmp_path / "two", sites=["resid_post.1,3"], n_steps=2, device="cpu")
    assert set(opened.lens("tuned", doc=DOC, folder=tmp_path / "two").df().site) == {
        f"resid_post.{n}" for n in (1, 3, 5)
    }
    with pytest.raises(UnknownName, match=r"resid_post\.2"):
        opened.lens("tuned", doc=DOC, folder=tmp_path / "two", sites="resid_post.2")


def test_fitting_stops_early_and_keeps_the_best(opened: Store) -> None:
    unembedding, random = unembedding_of(kit(opened.reader), "cpu"), np.random.default_rng(0)
    rows = torch.from_numpy(random.normal(size=(50, D_MODEL)).astype(np.float32))
    noise = Rows(rows, torch.from_numpy(random.normal(size=(50, D_MODEL)).astype(np.float32)))
    told: list[int] = []
    options = FitOptions(n_steps=500, evaluate_every=5, patience=2, learning_rate=50.0)
    fit = fit_translator(lambda: [Rows(rows, rows)], noise, unembedding, options, lambda step, _kl: told.append(step))
    assert fit.n_steps == told[-1] < 500
    weight, bias = torch.from_numpy(fit.translator.weight), torch.from_numpy(fit.translator.bias)
    assert mean_kl(unembedding, noise, weight, bias) == pytest.approx(fit.kl, rel=1e-6)
    assert fit.kl <= fit.kl_logit_lens == pytest.approx(mean_kl(unembedding, noise, weight * 0, bias * 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_its_logits_are_the_models_with_the_right_gradient(opened: Store, dtype: torch.dtype, norm: Any) -> None:
    unembedding = unembedding_of(kit(opened.reader), "cpu")
    bias = torch.linspace(-1, 1, D_MODEL) if norm == "layer" else None
    unembedding = replace(unembedding, weight=unembedding.weight[:50].to(dtype), norm=norm, bias=bias)
    rows = torch.randn(4, D_MODEL, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = _logits(unembedding, rows)
    torch.testing.assert_close(found.detach(), logits(unembedding, rows.detach()))
    (gradient,) = torch.autograd.grad(found.square().sum(), rows)
    exact = replace(unembedding, weight=unembedding.weight.float())
    step = torch.randn(4, D_MODEL, generator=torch.Generator().manual_seed(1)) * 1e-2
    ahead, behind = (_logits(exact, (rows + sign * step).detach()).square().sum() for sign in (1, -1))
    tolerance = 1e-2 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close((gradient * step).sum(), (ahead - behind) / 2, rtol=tolerance, atol=tolerance)


def test_held_out_documents_are_a_share_by_number_and_seed() -> None:
    docs = np.arange(20_000)
    first = is_held_out(docs, 0.1, 0)
    assert first.mean() == pytest.approx(0.1, abs=0.01)
    np.testing.assert_array_equal(is_held_out(docs[::-1], 0.1, 0), first[::-1])
    assert (is_held_out(docs, 0.1, 1) != first).any()
    assert (~first | is_held_out(docs, 0.2, 0)).all(), "a larger share holds the same ones out, and more"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_leaves_nothing_is_refused(opened: Store, tmp_path: Path, share: float) -> None:
    with pytest.raises(InvalidInput, match=r"above 0 and below 1"):
        fit_lens(opened, tmp_path / "none", sites=["resid_post.1"], n_steps=1, held_out=share, device="cpu")
    assert not (tmp_path / "none").exists()


def test_without_the_last_residual_stream_nothing_can_be_fitted(copied: Callable[[], Path], tmp_path: Path) -> None:
    path = copied()
    maintenance.drop(path, "sites/resid_post.5")
    with Store(path) as store, pytest.raises(MissingInput, match=r"resid_post\.5 is not stored.*--site resid_post\.5"):
        fit_lens(store, tmp_path / "none")


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
    "arguments",
    [
        {"lens": "tuned"},
        {"lens": "logit", "folder": "x"},
        {"lens": "attention"},
        {"lens": "tuned", "folder": "nowhere"},
    ],
    ids=["no folder", "a folder for logit", "no such lens", "no such folder"],
)
def test_lenses_that_cannot_be_are_refused(opened: Store, arguments: dict[str, Any]) -> None:
    with pytest.raises(ActstoreError):
        opened.lens(doc=DOC, **arguments)


# Commands


def test_reading_a_tuned_lens_imports_no_torch(small: SmallStore, fitted: tuple[Path, list[FittedSite]]) -> None:
    program = (
        "import actstore, sys; store = actstore.open(sys.argv[1]); "
        "assert len(store.lens('tuned', doc=7, folder=sys.argv[2])); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, str(small.path), str(fitted[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_commands_fit_and_show_a_lens(small: SmallStore, tmp_path: Path) -> None:
    store, out = str(small.path), str(tmp_path / "mine")
    run = CliRunner()
    options = ["--site", "resid_post.3", "--steps", "20", "--batch-rows", "300", "--device", "cpu", "--json"]
    done = run.invoke(main, ["fit-lens", store, "--out", out, *options])
    assert done.exit_code == 0, done.output
    (one,) = json.loads(done.stdout)
    assert (one["site"], one["translator"]) == ("resid_post.3", 4)
    assert one["kl_tuned_lens"] <= one["kl_logit_lens"]
    shown = run.invoke(main, ["lens", store, "--doc", str(DOC), "--tuned", out, "--json", "--sites", "resid_post.3"])
    assert shown.exit_code == 0, shown.output
    assert {row["site"] for row in json.loads(shown.stdout)} == {"resid_post.3"}
    picture = run.invoke(main, ["lens", store, "--doc", str(DOC), "--tuned", out])
    assert picture.exit_code == 0, picture.output
    assert "resid_post.3" in picture.stdout and "resid_post.5" in picture.stdout
