"""Lenses over stored residual streams, kept in the store: as extraction keeps them, and tuned ones as numpy says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from asking_support import Truth
from click.testing import CliRunner
from extraction_support import log_softmax, next_tokens
from store_support import Stopped, extract_some, hashes, truth
from tiny_world import HIDDEN, extract, tiny_world

import actstore
from actstore import maintenance
from actstore.cli import main
from actstore.errors import InvalidInput, MissingInput, NoSpace, UnknownName
from actstore.lenses.tuned_files import LensConfig, Translator, write_lens
from actstore.maintenance import save_lens_and_index
from actstore.recipe import Recipe
from actstore.store import StoreReader

K, N_LAYERS = 3, 3
SITES = ["resid_post.0", "resid_mid.1", "resid_post.1", "resid_post.2", "z.0"]
READ = SITES[:4]
Matrix = npt.NDArray[Any]


def stored(out: Path, **changes: Any) -> Path:
    """Extract sites and nothing else."""
    options: dict[str, Any] = {"sites": SITES, "saes": [], "lens_k": 0, "lens_sites": []}
    extract(out, **(options | changes))
    return out


def save(store: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {"k": K, "device": "cpu", "with_index": False}
    return save_lens_and_index(store, **(options | changes))


@pytest.fixture(scope="module")
def sites_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("sites") / "sites.act")


@pytest.fixture
def copied(sites_only: Path, tmp_path: Path) -> Path:
    """A copy of a store with sites alone, to be changed."""
    return Path(shutil.copytree(sites_only, tmp_path / "copy.act"))


def translators() -> dict[int, Translator]:
    random = np.random.default_rng(6)
    return {
        number: Translator(
            (random.normal(size=(HIDDEN, HIDDEN)) / 20).astype(np.float32),
            random.normal(size=HIDDEN).astype(np.float32),
        )
        for number in range(N_LAYERS)
    }


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tuned lens for the tiny world's model."""
    folder = tmp_path_factory.mktemp("lenses") / "my-lens"
    write_lens(folder, LensConfig(HIDDEN, N_LAYERS, "tiny-gemma"), translators())
    return folder


# The logit lens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_byte_is_that_of_extraction(tmp_path: Path, dtype: str) -> None:
    extract(tmp_path / "one.act", sites=SITES, saes=[], lens_k=K, lens_sites=READ, dtype=dtype)
    stored(tmp_path / "two.act", dtype=dtype)
    assert save(tmp_path / "two.act", with_index=True).complete
    one, two = (hashes(tmp_path / name, "arrays/lens", "kit") for name in ("one.act", "two.act"))
    assert one == two and len(one) > 2 * len(READ)
    assert maintenance.verify(tmp_path / "two.act").ok
    with actstore.open(tmp_path / "one.act") as first, actstore.open(tmp_path / "two.act") as second:
        for table in ("lens_tokens", "lens_summary"):
            ordered = f"SELECT * FROM {table} ORDER BY ALL"
            assert first.sql(ordered).arrow().equals(second.sql(ordered).arrow())
            assert len(first.sql(ordered)) > 0


def test_the_recipe_says_what_was_read_and_how(copied: Path) -> None:
    outcome = save(copied, sites=["resid_post.0"])
    reader = StoreReader(copied)
    recipe = Recipe.from_json(reader.passes[outcome.pass_id].recipe)
    assert (recipe.lens_name, recipe.lens_digest, recipe.lens_k, recipe.lens_sites) == (
        "logit",
        None,
        K,
        ("resid_post.0",),
    )
    assert [source.site for source in recipe.sources] == ["resid_post.0", "resid_post.2"]


def test_only_what_lacks_the_lens_is_read(copied: Path) -> None:
    first = save(copied, sites=["resid_post.1"])
    rest, again = save(copied), save(copied)
    assert rest.pass_id != first.pass_id and (again.pass_id, again.n_shards_made) == (rest.pass_id, 0)
    owners = {site: StoreReader(copied).layout.artifacts[f"lens/logit/{site}"] for site in READ}
    assert owners == dict.fromkeys(READ, rest.pass_id) | {"resid_post.1": first.pass_id}
    assert save(copied, sites=["resid_post.1"]).n_shards_made == 0


def test_a_stopped_run_resumes_to_the_same_bytes(copied: Path, sites_only: Path, tmp_path: Path) -> None:
    def report(doing: str, done: float, _total: float | None, _unit: str) -> None:
        if doing == "reading" and done >= 2:
            raise Stopped

    with pytest.raises(Stopped):
        save(copied, report=report)
    assert save(copied).n_shards_made == StoreReader(copied).layout.n_shards - 2
    whole = Path(shutil.copytree(sites_only, tmp_path / "whole.act"))
    save(whole)
    assert truth(copied) == truth(whole)


def test_the_rest_is_read_when_it_is_stored(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract_some(out, 2, sites=SITES, saes=[], lens_k=0, lens_sites=[], with_index=False)
    some = save(out)
    assert (some.n_shards_made, some.complete) == (2, False)
    stored(out, with_index=False)
    whole = save(out)
    assert whole.complete and whole.pass_id == some.pass_id
    stored(out, append=str(tiny_world().more), with_index=False)
    assert save(out).n_shards_made > 0 and maintenance.verify(out).ok


def test_read_outs_of_rounded_streams_are_named_in_health(tmp_path: Path) -> None:
    out = stored(tmp_path / "a.act", sites=["resid_post.0", "resid_post.2"], storage_dtype="bfloat16", with_index=False)
    save(out)
    checks = [row for row in StoreReader(out).tables()["health"] if row["name"] == "lens_rounding"]
    assert [check["subject"] for check in checks] == ["logit @ resid_post.0", "logit @ resid_post.2"]
    assert all(check["ok"] is None and "with rounding" in check["expected"] for check in checks)


# A tuned lens


def read_by_numpy(truth_of_store: Truth, rows: Matrix) -> Matrix:
    """Return log-probabilities of residual rows, in float64 from the kit's numbers."""
    reader = truth_of_store.reader
    piece = reader.kit_piece(reader.kit_digest("unembedding", "sites/resid_post.2"))
    gain, weight = (np.asarray(piece[name]).astype(np.float64) for name in ("gain", "weight"))
    normed = rows / np.sqrt((rows**2).mean(1, keepdims=True) + float(str(piece.attrs["norm_epsilon"]))) * gain
    cap = float(str(piece.attrs["softcap"]))
    return log_softmax(np.tanh(normed @ weight.T / cap) * cap)


def test_a_tuned_lens_equals_numpy(copied: Path, tuned: Path) -> None:
    assert save(copied, tuned=tuned).complete
    found = Truth(StoreReader(copied))
    targets = next_tokens(found)
    known = targets >= 0
    final = read_by_numpy(found, found.matrix("sites/resid_post.2").astype(np.float64))
    for site, number in (("resid_post.0", 1), ("resid_post.1", 2), ("resid_post.2", None)):
        rows = found.matrix(f"sites/{site}").astype(np.float64)
        if number is not None:
            one = translators()[number]
            rows = rows + rows @ one.weight.astype(np.float64).T + one.bias
        expected = read_by_numpy(found, rows)
        values, ids = (found.matrix(f"lens/my-lens/{site}/{name}") for name in ("values", "ids"))
        probabilities = np.exp(expected)
        target = np.take_along_axis(expected, np.maximum(targets, 0)[:, None], 1)
        np.testing.assert_allclose(values[known, 0], target[known, 0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(values[:, 1], -(probabilities * expected).sum(1), rtol=1e-4, atol=1e-4)
        kl = (np.exp(final) * (final - expected)).sum(1)
        np.testing.assert_allclose(values[:, 2], kl, rtol=1e-3, atol=1e-4)
        assert (kl.max() > 0.01) == (number is not None)
        np.testing.assert_allclose(values[:, 3:], -np.sort(-expected, axis=1)[:, :K], rtol=1e-4, atol=1e-4)
        chosen = np.take_along_axis(expected, ids[:, 1:].astype(np.int64), 1)
        np.testing.assert_allclose(chosen, values[:, 3:], rtol=1e-4, atol=1e-4)
        ranks = (expected > target).sum(1) + 1
        assert (ids[~known, 0] == -1).all() and (np.abs(ids[known, 0] - ranks[known]) <= 1).all()


def test_a_tuned_lens_reads_what_it_was_fitted_to(copied: Path, tuned: Path) -> None:
    save(copied, tuned=tuned)
    artifacts = StoreReader(copied).layout.artifacts
    assert [name for name in artifacts if name.startswith("lens/")] == [
        f"lens/my-lens/{site}" for site in ("resid_post.0", "resid_post.1", "resid_post.2")
    ]
    with pytest.raises(InvalidInput, match=r"my-lens cannot read resid_mid\.1"):
        save(copied, tuned=tuned, sites=["resid_mid.1"])


def test_questions_are_asked_of_a_saved_lens_by_its_name(copied: Path, tuned: Path) -> None:
    save(copied)
    save(copied, tuned=tuned, name="tuned-a", with_index=True)
    with actstore.open(copied) as store:
        live = store.lens("tuned", doc=7, k=2, folder=tuned).arrow()
        saved = store.lens("tuned-a", doc=7, k=2).arrow()
        assert saved.column_names == live.column_names and saved["token_id"].equals(live["token_id"])
        np.testing.assert_allclose(saved["logprob"], live["logprob"], rtol=1e-4, atol=1e-5)
        steps = {
            lens: store.query("lens_trajectory", {"doc": 7, "lens": lens}).arrow() for lens in ("logit", "tuned-a")
        }
        assert set(steps["tuned-a"]["site"].to_pylist()) == {"resid_post.0", "resid_post.1", "resid_post.2"}
        assert steps["logit"]["kl_to_final"].to_pylist() != steps["tuned-a"]["kl_to_final"].to_pylist()
        last = [row for row in steps["tuned-a"].to_pylist() if row["site"] == "resid_post.2"]
        assert all(abs(row["kl_to_final"]) < 1e-6 for row in last)
        with pytest.raises(UnknownName, match=r"no lens 'tuned-b'.*tuned-a"):
            store.lens("tuned-b", doc=7)


def test_a_lens_is_dropped_by_its_name(copied: Path, tuned: Path) -> None:
    save(copied, sites=["resid_post.0"])
    save(copied, tuned=tuned, sites=["resid_post.0"])
    assert maintenance.drop(copied, "my-lens/resid_post.0") == "lens/my-lens/resid_post.0"
    with pytest.raises(InvalidInput, match=r"could be sites/resid_post.0 or lens/logit/resid_post.0"):
        maintenance.drop(copied, "resid_post.0")
    with actstore.open(copied) as store:
        assert store.sql("SELECT DISTINCT lens FROM lens_tokens").rows() == [{"lens": "logit"}]
    assert save(copied, tuned=tuned, sites=["resid_post.0"]).n_shards_made > 0
    assert maintenance.verify(copied).ok


def test_other_translators_by_the_same_name_are_another_lens(copied: Path, tuned: Path, tmp_path: Path) -> None:
    save(copied, tuned=tuned)
    other = {number: Translator(one.weight * 2, one.bias) for number, one in translators().items()}
    write_lens(tmp_path / "my-lens", LensConfig(HIDDEN, N_LAYERS, "tiny-gemma"), other)
    with pytest.raises(InvalidInput, match="has it, in another way"):
        save(copied, tuned=tmp_path / "my-lens")
    with pytest.raises(InvalidInput, match=r"lens/my-lens/resid_post\.1 is stored already"):
        save(copied, tuned=tmp_path / "my-lens", sites=["resid_post.1"])
    assert save(copied, tuned=tmp_path / "my-lens", name="other").complete


# What is refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        pytest.param({"k": 0}, InvalidInput, "k is 0", id="no k"),
        pytest.param({"k": 10**6}, InvalidInput, "k is 1000000", id="k above the vocabulary"),
        pytest.param(
            {"name": "x"}, InvalidInput, "The logit lens cannot be called 'x'", id="a name for the logit lens"
        ),
        pytest.param({"sites": ["resid_post.9"]}, UnknownName, "no stored site 'resid_post.9'", id="not stored"),
        pytest.param({"sites": ["z.0"]}, InvalidInput, r"cannot read z\.0", id="not a residual stream"),
        pytest.param({"sites": "z.0"}, InvalidInput, "sites is the text", id="a text"),
        pytest.param({"tuned": "/nowhere"}, MissingInput, "no tuned lens in /nowhere", id="no folder"),
        pytest.param({"tuned": "TUNED", "name": "logit"}, InvalidInput, "cannot be called 'logit'", id="named logit"),
        pytest.param({"tuned": "TUNED", "name": "a/b"}, InvalidInput, "cannot be called 'a/b'", id="a path as name"),
        pytest.param({"device": "abacus"}, InvalidInput, "'abacus' is not known", id="no device"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_begun(
    sites_only: Path, tuned: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = hashes(sites_only)
    changes = {key: tuned if value == "TUNED" else value for key, value in changes.items()}
    with pytest.raises(error, match=message):
        save(sites_only, **changes)
    assert {name for name, digest in hashes(sites_only).items() if before.get(name) != digest} <= {"lock"}


def test_a_lens_of_another_model(sites_only: Path, tmp_path: Path) -> None:
    write_lens(tmp_path / "other", LensConfig(HIDDEN, N_LAYERS, "x", unembed_hash="0" * 64), translators())
    with pytest.raises(InvalidInput, match="is for another model"):
        save(sites_only, tuned=tmp_path / "other")


def test_the_final_stream_must_be_stored(tmp_path: Path) -> None:
    out = stored(tmp_path / "a.act", sites=["resid_post.0"], with_index=False)
    with pytest.raises(MissingInput, match=r"resid_post\.2 is not stored.*--site resid_post\.2"):
        save(out)


def test_streams_of_two_dtypes_have_no_common_final_distribution(copied: Path) -> None:
    maintenance.drop(copied, "resid_post.0")
    stored(copied, sites=["resid_post.0"], dataset=None, into=True, predictions=False, dtype="bfloat16")
    with pytest.raises(InvalidInput, match=r"resid_post\.0 was stored by a pass with another unembedding"):
        save(copied)
    assert save(copied, sites=["resid_post.1"]).complete


def test_a_disk_that_is_too_full(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actstore.extraction.plan.free_bytes", lambda _path: 1000)
    with pytest.raises(NoSpace, match="would take about"):
        save(copied)


# The command


def test_the_command_saves_and_says_json(copied: Path, tuned: Path) -> None:
    run = CliRunner()
    arguments = ["save-lens", str(copied), "--site", "resid_post.0", "-k", "2", "--device", "cpu"]
    done = run.invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["complete"] is True
    assert "is complete" in run.invoke(main, [*arguments, "--tuned", str(tuned)]).stdout
    with actstore.open(copied) as store:
        assert store.sql("SELECT DISTINCT lens FROM lens_summary ORDER BY 1").rows() == [
            {"lens": "logit"},
            {"lens": "my-lens"},
        ]


def test_saving_imports_no_transformers(copied: Path, tuned: Path) -> None:
    program = (
        "import sys; from actstore.maintenance import save_lens_and_index; "
        "made = save_lens_and_index(sys.argv[1], tuned=sys.argv[2], device='cpu'); "
        "assert made.complete and made.n_shards_made; "
        "sys.exit('transformers' in sys.modules or 'tokenizers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, copied, tuned], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
