"""An SAE explains its own site; a wrong one is named by the site that is better (DESIGN §8)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saes_support import plain_tensors, write_llama_scope, write_saelens, write_sparsify

from actstore.errors import InvalidInput
from actstore.health import HealthCheck
from actstore.recipe import SaeIdentity
from actstore.saes import SaeEncoder, SparseCoder, compete, expand_sae_arguments, load_sae, sae_health
from actstore.sites import Site

torch.set_num_threads(1)

WIDTH = 6
HERE, BELOW, ABOVE = Site("resid_post", 3), Site("resid_pre", 3), Site("resid_mid", 4)


def identity_coder(site: Site = HERE, *, declared_l0: float | None = None) -> SparseCoder:
    """An SAE that passes on whatever is positive or negative enough: two features per dimension."""
    basis = np.eye(WIDTH, dtype=np.float32)
    w_dec = np.concatenate([basis, -basis])
    return SparseCoder(
        SaeIdentity(
            sae="toy",
            site=str(site),
            width=2 * WIDTH,
            d_in=WIDTH,
            architecture="jumprelu",
            weights_digest="0" * 64,
            declared_l0=declared_l0,
        ),
        w_enc=np.ascontiguousarray(w_dec.T),
        w_dec=w_dec,
        b_enc=np.zeros(2 * WIDTH, np.float32),
        b_dec=np.zeros(WIDTH, np.float32),
        threshold=np.full(2 * WIDTH, 0.5, np.float32),
    )


def rows_of(scale: float, n_rows: int = 1500, seed: int = 0) -> torch.Tensor:
    """Rows that the toy explains the better the larger they are."""
    return scale * torch.randn(n_rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def by_name(checks: list[HealthCheck]) -> dict[str, HealthCheck]:
    return {check.name: check for check in checks}


def by_site(checks: list[HealthCheck]) -> dict[str, HealthCheck]:
    return {check.subject.removeprefix("toy @ "): check for check in checks}


def test_fvu_is_the_definition() -> None:
    rows = rows_of(1.0) + 3.0
    x = rows.double().numpy()
    decoded = np.where(np.abs(x) > 0.5, x, 0.0)
    expected = ((x - decoded) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    found = by_name(sae_health(SaeEncoder(identity_coder(), "cpu"), rows))
    assert found["sae_fvu"].value == pytest.approx(expected, rel=1e-5)
    assert all(check.ok for check in found.values())


@pytest.mark.parametrize(
    ("declared", "ok"),
    [pytest.param(4.0, True, id="near"), pytest.param(40.0, False, id="far"), pytest.param(1.0, False, id="under")],
)
def test_l0_is_compared_with_the_declared_one(declared: float, ok: bool) -> None:
    checks = by_name(sae_health(SaeEncoder(identity_coder(declared_l0=declared), "cpu"), rows_of(1.0)))
    expected = (rows_of(1.0).abs() > 0.5).sum(1).double().mean()
    assert checks["sae_l0"].value == pytest.approx(float(expected))
    assert checks["sae_l0"].ok is ok


def test_an_undeclared_l0_is_not_judged() -> None:
    assert "sae_l0" not in by_name(sae_health(SaeEncoder(identity_coder(), "cpu"), rows_of(1.0)))


def test_few_rows_prove_nothing_but_weights_are_judged() -> None:
    found = by_name(sae_health(SaeEncoder(identity_coder(declared_l0=4), "cpu"), rows_of(1.0, 1023)))
    assert {name: check.ok for name, check in found.items()} == {
        "sae_finite_rows": True,
        "sae_fvu": None,
        "sae_dead_share": None,
        "sae_decoder_norm": True,
        "sae_threshold": True,
        "sae_l0": None,
    }


def _changed(**arrays: Any) -> SparseCoder:
    return replace(identity_coder(), **arrays)


SOUND = identity_coder()
ONE_BROKEN_ROW = torch.where(torch.arange(1500)[:, None] == 7, torch.nan, rows_of(1.0))


@pytest.mark.parametrize(
    ("coder", "rows", "failing"),
    [
        pytest.param(SOUND, rows_of(1e-3), {"sae_dead_share", "sae_fvu"}, id="nothing_fires"),
        pytest.param(
            _changed(w_dec=SOUND.w_dec * 2.2), rows_of(1.0), {"sae_decoder_norm", "sae_fvu"}, id="decoder_long"
        ),
        pytest.param(_changed(w_dec=-SOUND.w_dec), rows_of(1.0), {"sae_fvu"}, id="decoder_turned_round"),
        pytest.param(_changed(threshold=-SOUND.threshold), rows_of(1.0), {"sae_threshold"}, id="threshold_sign"),
        pytest.param(SOUND, ONE_BROKEN_ROW, {"sae_finite_rows", "sae_fvu"}, id="nan"),
    ],
)
def test_what_is_wrong_is_named(coder: SparseCoder, rows: torch.Tensor, failing: set[str]) -> None:
    checks = sae_health(SaeEncoder(coder, "cpu"), rows)
    assert {check.name for check in checks if check.ok is False} == failing


def test_rows_that_do_not_vary_have_no_fvu() -> None:
    (fvu,) = [
        check
        for check in sae_health(SaeEncoder(identity_coder(), "cpu"), torch.ones(1500, WIDTH))
        if check.name == "sae_fvu"
    ]
    assert fvu.value is None and fvu.ok is False


def test_no_rows_prove_nothing() -> None:
    checks = by_name(sae_health(SaeEncoder(identity_coder(), "cpu"), torch.empty(0, WIDTH)))
    assert checks["sae_fvu"].ok is None and checks["sae_fvu"].value is None


def test_the_right_site_wins() -> None:
    candidates = {BELOW: rows_of(0.5), HERE: rows_of(2.0), ABOVE: rows_of(1.0)}
    found = by_site(compete(SaeEncoder(identity_coder(), "cpu"), candidates))
    assert list(found) == ["resid_pre.3", "resid_post.3", "resid_mid.4"]
    assert all(check.ok for check in found.values())


def test_a_wrong_site_is_refused_and_the_better_one_named() -> None:
    candidates = {BELOW: rows_of(0.5), HERE: rows_of(2.0), ABOVE: rows_of(1.0)}
    found = by_site(compete(SaeEncoder(identity_coder(BELOW), "cpu"), candidates))
    assert {site: check.ok for site, check in found.items()} == {
        "resid_pre.3": False,
        "resid_post.3": False,
        "resid_mid.4": False,
    }
    assert "resid_post.3 explains it better" in found["resid_pre.3"].expected


@pytest.mark.parametrize(("share", "ok"), [(0.96, True), (0.94, False)], ids=["within_5_percent", "beyond_5_percent"])
def test_a_draw_is_won_by_the_declared_site(share: float, ok: bool) -> None:
    rows = rows_of(1.0)
    small = rows.abs() <= 0.5
    rival = torch.where(small, rows * share**0.5, rows)  # unexplained is what is small, and little of the variance
    found = by_site(compete(SaeEncoder(identity_coder(), "cpu"), {HERE: rows, BELOW: rival}))
    ratio = (found["resid_pre.3"].value or 0) / (found["resid_post.3"].value or 1)
    assert ratio == pytest.approx(share, abs=0.005)
    assert found["resid_pre.3"].ok is found["resid_post.3"].ok is ok


def test_an_fvu_above_one_is_refused_even_where_nothing_is_better() -> None:
    coder = replace(identity_coder(), w_dec=-identity_coder().w_dec)
    found = by_site(compete(SaeEncoder(coder, "cpu"), {HERE: rows_of(2.0)}))
    assert found["resid_post.3"].ok is False and (found["resid_post.3"].value or 0) > 1


def fvu_of(rows: torch.Tensor) -> float:
    """What the toy leaves: everything that is small, of the variance around the mean."""
    values = rows.double().numpy()
    left = np.where(np.abs(values) <= 0.5, values, 0)
    return float((left**2).sum() / ((values - values.mean(axis=0)) ** 2).sum())


def test_a_site_that_is_far_off_on_the_first_rows_is_not_asked_on_the_others() -> None:
    near, far = rows_of(1.8, 4000, 1), rows_of(0.5, 4000, 2)
    far[1024:] = rows_of(9.0, 2976)  # what comes later would speak for it
    found = by_site(compete(SaeEncoder(identity_coder(), "cpu"), {HERE: rows_of(2.0, 4000), BELOW: near, ABOVE: far}))
    assert found["resid_post.3"].value == pytest.approx(fvu_of(rows_of(2.0, 4000)), rel=1e-5)
    assert found["resid_pre.3"].value == pytest.approx(fvu_of(near), rel=1e-5)
    assert found["resid_mid.4"].value == pytest.approx(fvu_of(far[:1024]), rel=1e-5)
    assert fvu_of(far[:1024]) > 2 * fvu_of(rows_of(2.0, 4000)) and all(check.ok for check in found.values())
    assert found["resid_mid.4"].expected.endswith("on the first 1,024 rows")
    assert "1,024" not in found["resid_pre.3"].expected


def test_a_wrong_site_is_found_on_all_rows_where_the_first_do_not_tell() -> None:
    rival = rows_of(1.0, 4000, 1)
    rival[1024:] = rows_of(6.0, 2976)
    found = by_site(compete(SaeEncoder(identity_coder(), "cpu"), {HERE: rows_of(1.0, 4000), BELOW: rival}))
    assert found["resid_post.3"].ok is found["resid_pre.3"].ok is False
    assert found["resid_pre.3"].value == pytest.approx(fvu_of(rival), rel=1e-5)


def test_a_far_site_is_not_compared_with_what_later_rows_make_of_the_declared_one() -> None:
    own, rival = rows_of(2.0, 4000), rows_of(1.0, 4000, 1)
    own[1024:] = rows_of(0.3, 2976)  # later the declared site is explained worse, and so is every other
    rival[1024:] = rows_of(0.1, 2976)
    assert 2 * fvu_of(own[:1024]) < fvu_of(rival[:1024]) < 0.95 * fvu_of(own) < fvu_of(rival)
    found = by_site(compete(SaeEncoder(identity_coder(), "cpu"), {HERE: own, BELOW: rival}))
    assert found["resid_pre.3"].value == pytest.approx(fvu_of(rival), rel=1e-5)
    assert all(check.ok for check in found.values())


def test_a_site_without_an_fvu_is_not_taken_for_a_far_one() -> None:
    flat = torch.ones(1500, WIDTH)
    flat[1024:] = rows_of(9.0, 476)
    found = by_site(compete(SaeEncoder(identity_coder(), "cpu"), {HERE: rows_of(1.0), BELOW: flat}))
    assert found["resid_pre.3"].value == pytest.approx(fvu_of(flat), rel=1e-5) and not found["resid_post.3"].ok


def test_with_few_rows_nobody_wins() -> None:
    candidates = {BELOW: rows_of(0.5, 500), HERE: rows_of(2.0, 500)}
    assert {check.ok for check in compete(SaeEncoder(identity_coder(BELOW), "cpu"), candidates)} == {None}


def test_the_declared_site_must_take_part() -> None:
    with pytest.raises(InvalidInput, match=r"resid_post\.3 is not among"):
        compete(SaeEncoder(identity_coder(), "cpu"), {BELOW: rows_of(1.0)})


def _load(folder: Path) -> SparseCoder:
    return load_sae(expand_sae_arguments([str(folder)])[0])


def _health(coder: SparseCoder) -> dict[str, bool | None]:
    rows = torch.randn(1500, 10, generator=torch.Generator().manual_seed(2))
    return {check.name: check.ok for check in sae_health(SaeEncoder(coder, "cpu"), rows)}


def test_weights_are_judged_by_what_is_promised(tmp_path: Path) -> None:
    assert not {"sae_decoder_norm", "sae_threshold"} & set(_health(_load(write_saelens(tmp_path, plain_tensors()))))
    assert _health(_load(write_sparsify(tmp_path)[0]))["sae_decoder_norm"]
    stretched = _load(write_sparsify(tmp_path, normalize_decoder=False)[0])
    assert "sae_decoder_norm" not in _health(stretched)
    assert _health(_load(write_llama_scope(tmp_path)[0]))["sae_threshold"]


def test_every_architecture_competes(tmp_path: Path) -> None:
    """A coder that passes everything on, through layer_norm and the 20 largest, explains its site and no other."""
    basis = np.concatenate([np.eye(10), -np.eye(10)]).astype(np.float32)
    arrays = {"W_enc": basis.T, "W_dec": basis, "b_enc": np.zeros(20, np.float32), "b_dec": np.zeros(10, np.float32)}
    options = {"architecture": "topk", "k": 5, "d_sae": 20, "normalize_activations": "layer_norm"}
    coder = _load(write_saelens(tmp_path, arrays, **options))
    random = torch.Generator().manual_seed(1)
    sharp = torch.randn(1500, 10, generator=random).pow(3)  # its five largest are nearly all of it
    blunt = torch.randn(1500, 10, generator=random).sign()
    checks = compete(SaeEncoder(coder, "cpu"), {Site("resid_pre", 3): sharp, Site("resid_post", 3): blunt})
    assert [check.ok for check in checks] == [True, True] and (checks[0].value or 1) < 0.2 < (checks[1].value or 0)
