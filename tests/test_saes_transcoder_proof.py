"""A transcoder explains what it writes by what it reads, and no other pair: toys that pass rows on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actstore.errors import InvalidInput
from actstore.recipe import SaeIdentity
from actstore.saes import (
    SaeEncoder,
    SparseCoder,
    check_width,
    compete,
    sae_health,
)
from actstore.sites import Site

torch.set_num_threads(1)


def identity_of(read: str, write: str | None) -> SaeIdentity:
    return SaeIdentity(
        sae="toy", site=read, write_site=write, width=12, d_in=6, architecture="jumprelu", weights_digest="0" * 64
    )


def toy(read: str = "ln2.3", write: str | None = "mlp_out.3", **changes: Any) -> SparseCoder:
    """A transcoder that passes on what is positive or negative enough, and writes its double in another order."""
    basis = np.eye(6, dtype=np.float32)
    w_dec = np.concatenate([basis, -basis])
    arrays = {
        "w_enc": np.ascontiguousarray(w_dec.T),
        "w_dec": np.roll(w_dec, 1, axis=1) * 2,
        "b_enc": np.zeros(12, np.float32),
        "b_dec": np.zeros(6, np.float32),
        "threshold": np.full(12, 0.1, np.float32),
    }
    return SparseCoder(identity_of(read, write), **(arrays | changes))


def noise(seed: int) -> torch.Tensor:
    return torch.randn(1500, 6, generator=torch.Generator().manual_seed(seed))


SOURCE = noise(0)
READS = {Site("ln2_normalized", 3): SOURCE * 0.2, Site("ln2", 3): SOURCE, Site("resid_mid", 3): noise(1)}
WRITES = {
    Site("mlp_out_raw", 3): SOURCE.roll(1, dims=1) * 0.5,
    Site("mlp_out", 3): SOURCE.roll(1, dims=1) * 2,
    Site("mlp_out", 2): noise(2),
}


def better(read: str, write: str, reads: Any = READS, writes: Any = WRITES) -> str | None:
    """Return what the verdict of a declared pair calls better."""
    checks = {check.subject: check for check in compete(SaeEncoder(toy(read, write), "cpu"), reads, writes)}
    own = checks[f"toy @ {read}>{write}"]
    assert own.ok is ("explains it better" not in own.expected and (own.value or 2) <= 1)
    return own.expected.partition("; ")[2].partition(" explains it better")[0] or None


def test_the_right_pair_wins() -> None:
    checks = compete(SaeEncoder(toy(), "cpu"), READS, WRITES)
    assert [check.subject.removeprefix("toy @ ") for check in checks] == [
        "ln2_normalized.3>mlp_out.3",
        "ln2.3>mlp_out.3",
        "resid_mid.3>mlp_out.3",
        "ln2.3>mlp_out_raw.3",
        "ln2.3>mlp_out.2",
    ]
    assert all(check.ok for check in checks)
    assert (checks[1].value or 1) < 0.01


@pytest.mark.parametrize(
    ("read", "write", "expected"),
    [
        ("ln2_normalized.3", "mlp_out.3", "reading ln2.3"),
        ("resid_mid.3", "mlp_out.3", "reading ln2.3"),
        ("ln2.3", "mlp_out_raw.3", "writing mlp_out.3"),
        ("ln2.3", "mlp_out.2", "writing mlp_out.3"),
    ],
)
def test_the_better_site_is_named_with_its_side(read: str, write: str, expected: str) -> None:
    assert better(read, write) == expected


def test_a_layer_too_low_on_both_sides_is_named() -> None:
    reads, writes = READS | {Site("ln2", 2): noise(4)}, WRITES
    assert better("ln2.2", "mlp_out.2", reads, writes) == "reading ln2.3 and writing mlp_out.3"


def test_health_is_of_what_is_written() -> None:
    encoder, target = SaeEncoder(toy(), "cpu"), WRITES[Site("mlp_out", 3)] + 5
    checks = {check.name: check for check in sae_health(encoder, SOURCE, target)}
    x, y = SOURCE.double().numpy(), target.double().numpy()
    decoded = np.roll(np.where(np.abs(x) > 0.1, x, 0), 1, axis=1) * 2
    expected = ((y - decoded) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert checks["sae_fvu"].value == pytest.approx(expected, rel=1e-5)
    broken = torch.where(torch.arange(1500)[:, None] == 7, torch.nan, target)
    found = {check.name: check for check in sae_health(encoder, SOURCE, broken)}
    assert found["sae_finite_rows"].value == 1 and found["sae_finite_rows"].ok is False


def test_the_declared_site_to_write_must_take_part() -> None:
    with pytest.raises(InvalidInput, match=r"mlp_out\.3 is not among"):
        compete(SaeEncoder(toy(), "cpu"), READS, {Site("mlp_out", 2): noise(2)})


def test_targets_belong_to_transcoders_alone() -> None:
    with pytest.raises(InvalidInput, match=r"was given None as .* Accepted: \(1500, 6\) of mlp_out\.3"):
        SaeEncoder(toy(), "cpu").encode(SOURCE)
    with pytest.raises(InvalidInput, match="none but what it reads"):
        SaeEncoder(toy(write=None), "cpu").encode(SOURCE, targets=SOURCE)
    with pytest.raises(InvalidInput, match="Accepted"):
        SaeEncoder(toy(), "cpu").encode(SOURCE, targets=SOURCE[:, :5])


def test_a_target_that_is_not_finite_leaves_its_firings() -> None:
    target = torch.where(torch.arange(1500)[:, None] == 7, torch.inf, WRITES[Site("mlp_out", 3)])
    tile = SaeEncoder(toy(), "cpu").encode(SOURCE, targets=target)
    assert tile.reconstruction[7].isnan().tolist() == [False, True, True]
    assert tile.counts[7] == tile.reconstruction[7, 0] > 0
    assert not tile.reconstruction[8].isnan().any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subtracts_b_dec": True}, "cannot be subtracted"),
        ({"normalisation": "layer_norm"}, "no defined output"),
        ({"w_skip": np.zeros((6, 5), np.float32)}, "w_skip is (6, 5)"),
        ({"k": 13}, "k is 13"),
    ],
    ids=["subtracts", "normalises", "skip_of_another_width", "k"],
)
def test_a_transcoder_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    from actstore.saes.coder import Normalisation

    if "normalisation" in changes:
        changes = {"normalisation": Normalisation(changes["normalisation"])}
    with pytest.raises(InvalidInput) as caught:
        toy(**changes)
    assert message in str(caught.value)


def test_both_widths_are_held_against_the_model() -> None:
    check_width(toy(), 6, 6)
    with pytest.raises(
        InvalidInput, match=r"writes vectors of width 6, and the site mlp_out\.3 of this model has width 8"
    ):
        check_width(toy(), 6, 8)
