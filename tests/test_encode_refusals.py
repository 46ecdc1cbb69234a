"""Encoding that is refused before anything is begun; its plan and its command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from encode_support import CODERS, NO_LENS, SITES, TOP, coders, copy_of_sites, encode, store_of_sites
from store_support import extract_some, hashes
from tiny_world import RESIDUAL_SAE, tiny_world

import actstore
from actstore import maintenance
from actstore.cli import main
from actstore.errors import ActstoreError, InvalidInput, MissingInput, NoSpace, UnknownName
from actstore.extraction import EncodeRequest, plan_encoding
from actstore.store import StoreReader


@pytest.fixture(scope="module")
def sites_only() -> Path:
    return store_of_sites()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of a store with sites alone, to be changed."""
    return copy_of_sites(tmp_path)


# What is refused


def residual(site: str) -> Callable[[], str]:
    return lambda: tiny_world().residual_sae.replace("resid_post.1", site)


REFUSED = {
    "a site that is not stored": (
        residual("resid_post.0"),
        UnknownName,
        r"'resid_post.0'.*z\.0.*--site 'resid_post.0'",
    ),
    "neurons that are not stored": (lambda: "neurons:mlp_act.0", UnknownName, r"'mlp_act\.0'.*--into STORE --site"),
    "no such neurons": (lambda: "neurons:q.*", UnknownName, r"stored site 'q\.\*'.*extract MODEL --into"),
    "a transcoder's other site": (
        lambda: coders()[3].replace("mlp_out.1", "mlp_out.0"),
        UnknownName,
        "no stored site 'mlp_out.0'",
    ),
    "another width": (residual("z.0"), InvalidInput, r"width 32, and the site z\.0 .* 40"),
    "a pattern": (residual("pattern.1"), UnknownName, "no stored site 'pattern.1'"),
    "no file": (lambda: "/nowhere/at/all/params.npz@z.0", ActstoreError, "nowhere"),
    "one id twice": (lambda: f"{RESIDUAL_SAE}=neurons:z.0", InvalidInput, "given twice"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_be_is_refused_and_nothing_is_begun(sites_only: Path, case: str) -> None:
    argument, error, message = REFUSED[case]
    before = hashes(sites_only)
    saes = [tiny_world().residual_sae, argument()] if case == "one id twice" else [argument()]
    with pytest.raises(error, match=message):
        encode(sites_only, saes)
    assert {name for name, digest in hashes(sites_only).items() if before.get(name) != digest} <= {"lock"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_bits": 24}, "--activation-bits 24 is out of range"),
        ({"neurons_top": 0}, "--neurons-top is 0"),
        ({"device": "abacus"}, "The device 'abacus' is not known"),
        ({"saes": "text"}, "saes is the text 'text'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be(sites_only: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        maintenance.encode_and_index(sites_only, **({"saes": list(coders()), "device": "cpu"} | changes))


def test_no_coder_at_all(sites_only: Path) -> None:
    with pytest.raises(InvalidInput, match="No SAE was given"):
        actstore.encode(sites_only, [])


def test_an_id_that_is_stored_is_refused(copied: Path) -> None:
    encode(copied, [tiny_world().residual_sae])
    with pytest.raises(InvalidInput, match=f"firings/{RESIDUAL_SAE} is stored already, by pass"):
        encode(copied, [tiny_world().residual_sae], activation_bits=12)


def test_a_store_must_be_there_and_local(tmp_path: Path) -> None:
    with pytest.raises(MissingInput):
        encode(tmp_path / "none.act")
    with pytest.raises(InvalidInput, match="remote"):
        actstore.encode("memory://x.act", ["neurons:z.0"])


def test_nothing_stored_yet_says_so(tmp_path: Path) -> None:
    extract_some(tmp_path / "a.act", 0, sites=SITES, saes=[], **NO_LENS)
    with pytest.raises(MissingInput, match=r"No shard of .*resid_post\.1 is stored yet"):
        encode(tmp_path / "a.act")


def test_a_disk_that_is_too_full(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actstore.extraction.plan.free_bytes", lambda _path: 1000)
    with pytest.raises(NoSpace, match="would take about"):
        encode(copied)
    assert encode(copied, force=True).complete


# The command


def test_the_plan_reads_no_weights_and_changes_nothing(sites_only: Path) -> None:
    before = hashes(sites_only)
    plan = plan_encoding(EncodeRequest(store=sites_only, saes=coders(), neurons_top=TOP))
    layout = StoreReader(sites_only).layout
    assert (plan.n_rows, plan.n_shards) == (layout.n_rows, layout.n_shards)
    assert {size.artifact for size in plan.artifacts} == {f"firings/{sae}" for sae in CODERS}
    assert hashes(sites_only) == before


def test_the_command_plans_encodes_and_says_json(copied: Path) -> None:
    run = CliRunner()
    arguments = ["encode", str(copied), *coders()[:2], "neurons:mlp_act.1", "--device", "cpu", "--json"]
    planned = run.invoke(main, [*arguments, "--plan"])
    assert planned.exit_code == 0 and json.loads(planned.stdout)["kit_bytes"] > 300 * 64 * 4
    done = run.invoke(main, [*arguments, "--allow-unhealthy"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["complete"] is True
    told = run.invoke(main, [one for one in arguments if one != "--json"])
    assert "is complete. Made 0 shards" in told.stdout
    assert run.invoke(main, ["encode", str(copied)]).exit_code == 2


def test_encoding_imports_no_transformers(copied: Path) -> None:
    program = (
        "import sys, actstore; "
        "made = actstore.encode(sys.argv[1], sys.argv[2:], device='cpu', allow_unhealthy=True); "
        "assert made.complete and made.n_shards_made; "
        "sys.exit('transformers' in sys.modules or 'tokenizers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, copied, *coders()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
