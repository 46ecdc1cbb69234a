"""Fitting a tuned lens from a store, and the commands that fit and show one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking_support import SmallStore
from click.testing import CliRunner
from safetensors.numpy import load_file
from tuned_support import D_MODEL, DOC, FITTED, N_LAYERS, arrays_of, kit, numpy_logprobs

from actstore import maintenance
from actstore.api import Store
from actstore.cli import main
from actstore.errors import InvalidInput, MissingInput, UnknownName
from actstore.lens_fitting import FittedSite, fit_lens, is_held_out
from actstore.lenses.fitting import FitOptions, Rows, _logits, fit_translator, mean_kl
from actstore.lenses.tuned import unembed_hash
from actstore.models import logits, unembedding_of


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
