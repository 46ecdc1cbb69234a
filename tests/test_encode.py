"""New coders over stored sites without the model: the same bits as extraction, resumed, shared, proved, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from encode_support import CODERS, SITES, TOP, coders, encode, start_encoding
from store_support import Stopped, copy_of_finished, extract_some, hashes, reseal, truth
from tiny_world import RESIDUAL_SAE, WORDS, extract, tiny_world
from transcoder_support import unnamed

import actstore
from actstore import maintenance
from actstore.cli import main
from actstore.errors import ActstoreError, InvalidInput, MissingInput, NoSpace, Unhealthy, UnknownName
from actstore.extraction import EncodeRequest, plan_encoding
from actstore.recipe import Recipe
from actstore.store import StoreReader

TABLES = ("activations", "features", "examples", "feature_logits", "reconstruction", "saes")
NO_LENS: dict[str, Any] = {"lens_k": 0, "lens_sites": []}
Health = dict[tuple[str, str], dict[str, Any]]


def stored(out: Path, **changes: Any) -> Path:
    """Extract sites and nothing else."""
    extract(out, **({"sites": SITES, "saes": []} | NO_LENS | changes))
    return out


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store whose coders were extracted, and one whose coders were encoded."""
    folder = tmp_path_factory.mktemp(request.param)
    extract(folder / "one.act", sites=SITES, saes=list(coders()), neurons_top=TOP, dtype=request.param, **NO_LENS)
    stored(folder / "two.act", dtype=request.param)
    encode(folder / "two.act", with_index=True)
    return folder / "one.act", folder / "two.act"


@pytest.fixture(scope="module")
def sites_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("sites") / "sites.act")


@pytest.fixture
def copied(sites_only: Path, tmp_path: Path) -> Path:
    """A copy of a store with sites alone, to be changed."""
    return Path(shutil.copytree(sites_only, tmp_path / "copy.act"))


def health(store: Path) -> Health:
    return {(row["name"], row["subject"]): row for row in StoreReader(store).tables()["health"]}


# The same numbers


@pytest.mark.parametrize("home", ["firings", "arrays/reconstruction", "arrays/sites", "kit"])
def test_every_byte_is_that_of_extraction(pair: tuple[Path, Path], home: str) -> None:
    one, two = (hashes(store, home) for store in pair)
    assert one == two and len(one) >= 5


def test_every_coder_fires(pair: tuple[Path, Path]) -> None:
    reader = StoreReader(pair[1])
    n_firings = {sae: sum(len(reader.firings(sae, shard).features) for shard in (0, 1)) for sae in CODERS}
    assert min(n_firings.values()) > 50, n_firings


def test_sql_cannot_tell_them_apart(pair: tuple[Path, Path]) -> None:
    with actstore.open(pair[0]) as one, actstore.open(pair[1]) as two:
        for table in TABLES:
            columns = "* EXCLUDE (pass)" if table == "saes" else "*"
            ordered = f"SELECT {columns} FROM {table} ORDER BY ALL"
            assert one.sql(ordered).arrow().equals(two.sql(ordered).arrow()), table


def test_the_recipe_says_what_it_stands_on(pair: tuple[Path, Path]) -> None:
    reader = StoreReader(pair[1])
    (site_pass, encode_pass) = (Recipe.from_json(made.recipe) for made in reader.passes.values())
    assert {source.site: source.digest for source in encode_pass.sources} == dict.fromkeys(SITES, site_pass.digest)
    assert {source.dtype for source in encode_pass.sources} == {site_pass.compute_dtype}
    assert not site_pass.sources and "sources" not in site_pass.to_json()
    assert encode_pass.model == site_pass.model and encode_pass.corpus == site_pass.corpus
    assert maintenance.verify(pair[1]).ok


def test_nothing_can_differ_where_sites_are_stored_as_computed(pair: tuple[Path, Path]) -> None:
    checks = health(pair[1])
    for sae in CODERS:
        check = checks["sae_flips", sae]
        assert (check["value"], check["ok"]) == (0.0, True) and "as computed" in check["expected"]


def test_special_rows_and_bits_are_as_asked_for(copied: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"encode_special": True, "activation_bits": 23}
    residual = tiny_world().residual_sae
    encode(copied, [residual], **asked)
    extract(tmp_path / "one.act", sites=[], saes=[residual], with_index=False, **NO_LENS, **asked)
    assert hashes(copied, "firings") == hashes(tmp_path / "one.act", "firings")


# Rounded sites


def places(store: Path, sae: str, shard: int, width: int) -> npt.NDArray[np.int64]:
    one = StoreReader(store).firings(sae, shard)
    return np.array([row * width + int(feature) for row in range(one.n_rows) for feature in fired(one, row)])


def fired(firings: Any, row: int) -> Any:
    return firings.features[firings.indptr[row] : firings.indptr[row + 1]]


def test_flips_of_rounded_sites_are_measured_where_the_coder_was_extracted(tmp_path: Path) -> None:
    world, out = tiny_world(), tmp_path / "a.act"
    extract(out, storage_dtype="bfloat16", with_index=False, **NO_LENS)
    again = world.residual_sae.replace(RESIDUAL_SAE, "again", 1)
    encode(out, [again])
    was, now = (set(places(out, sae, 0, 300)) for sae in (RESIDUAL_SAE, "again"))
    check = health(out)["sae_flips", "again"]
    assert check["value"] == pytest.approx(1000 * len(was ^ now) / len(was)) and check["ok"] is None
    assert "with rounding: resid_post.1" in check["expected"] and RESIDUAL_SAE in check["expected"]
    assert 0 < len(was ^ now) < len(was) / 4, "the test would see nothing"


def test_flips_of_rounded_sites_are_not_proved_without_the_model(tmp_path: Path) -> None:
    out = stored(tmp_path / "a.act", storage_dtype="bfloat16", with_index=False)
    encode(out, [tiny_world().residual_sae])
    check = health(out)["sae_flips", RESIDUAL_SAE]
    assert (check["value"], check["ok"]) == (None, None) and "not measured" in check["expected"]


def test_the_same_coder_by_another_name_does_not_flip(tmp_path: Path) -> None:
    out = copy_of_finished(tmp_path)
    encode(out, [tiny_world().residual_sae.replace(RESIDUAL_SAE, "again", 1)])
    check = health(out)["sae_flips", "again"]
    assert (check["value"], check["ok"]) == (0.0, True) and RESIDUAL_SAE in check["expected"]


# Resuming and sharing


def test_the_same_command_makes_nothing_twice(copied: Path) -> None:
    first, again = encode(copied), encode(copied)
    assert first.complete and first.n_shards_made == StoreReader(copied).layout.n_shards
    assert again.complete and again.n_shards_made == 0 and again.pass_id == first.pass_id


def test_a_stopped_run_resumes_to_the_same_bytes(copied: Path, whole: Path) -> None:
    def report(doing: str, done: float, _total: float | None, _unit: str) -> None:
        if doing == "encoding" and done >= 2:
            raise Stopped

    with pytest.raises(Stopped):
        encode(copied, coders()[:2], report=report)
    assert encode(copied, coders()[:2]).n_shards_made == StoreReader(copied).layout.n_shards - 2
    assert truth(copied) == truth(whole) and maintenance.verify(copied).ok


@pytest.fixture(scope="module")
def whole(sites_only: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that two coders were encoded into, undisturbed."""
    out = Path(shutil.copytree(sites_only, tmp_path_factory.mktemp("whole") / "whole.act"))
    encode(out, coders()[:2])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dies_at", [9, 31, 60])
def test_a_killed_run_resumes_to_the_same_bytes(copied: Path, whole: Path, dies_at: int) -> None:
    killed = start_encoding(copied, coders()[:2], dies_at=dies_at)
    killed.join()
    assert killed.exitcode == -9
    assert encode(copied, coders()[:2]).complete
    assert truth(copied) == truth(whole) and maintenance.verify(copied).ok


@pytest.mark.slow
def test_two_processes_share_the_work(copied: Path, whole: Path) -> None:
    both = [start_encoding(copied, coders()[:2]) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert encode(copied, coders()[:2]).n_shards_made == 0
    assert truth(copied) == truth(whole) and maintenance.verify(copied).ok


def test_a_site_that_is_not_stored_everywhere_is_encoded_as_far_as_it_goes(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "a.act"
    extract_some(out, 2, sites=SITES, saes=[], with_index=False, **NO_LENS)
    some = encode(out, coders()[:2])
    assert (some.n_shards_made, some.complete) == (2, False)
    stored(out, with_index=False)
    assert encode(out, coders()[:2]).complete
    assert truth(out) == truth(whole)


def test_appended_documents_are_encoded_by_the_same_command(copied: Path) -> None:
    first = encode(copied, [tiny_world().residual_sae])
    appended = stored_again(copied)
    assert first.pass_id in appended.unfinished
    again = encode(copied, [tiny_world().residual_sae])
    assert again.complete and again.pass_id == first.pass_id and again.n_shards_made > 0
    assert not again.unfinished and maintenance.verify(copied).ok


def stored_again(out: Path) -> Any:
    return extract(out, sites=SITES, saes=[], append=str(tiny_world().more), **NO_LENS)


def test_the_index_gets_parts_and_loses_none(copied: Path) -> None:
    before = hashes(copied, "index")
    encode(copied, with_index=True)
    after = hashes(copied, "index")
    assert {name for name in before if after.get(name) != before[name]} == {"index/CURRENT"}
    added = {name.split("/")[1].split(".")[0] for name in after.keys() - before.keys() if name.endswith(".duckdb")}
    assert added == {"core", "firings", "features", "reconstruction"}


def test_no_index_leaves_the_index(copied: Path) -> None:
    before = hashes(copied, "index")
    encode(copied, coders()[:1], with_index=False)
    assert hashes(copied, "index") == before


def test_firings_outlive_the_site_that_they_were_made_from(copied: Path) -> None:
    encode(copied, [tiny_world().residual_sae], with_index=True)
    firings = hashes(copied, "firings")
    maintenance.drop(copied, "sites/resid_post.1")
    with actstore.open(copied) as store:
        assert hashes(copied, "firings") == firings and store.saes == [RESIDUAL_SAE]
        assert store.sql("SELECT count(*) FROM activations").scalar() > 0
        assert json.loads(store.sql("SELECT recipe FROM passes WHERE recipe LIKE '%sources%'").scalar())["sources"]
    assert maintenance.verify(copied).ok
    with pytest.raises(UnknownName, match=r"no stored site 'resid_post\.1'"):
        encode(copied, [tiny_world().residual_sae])


def test_what_was_dropped_is_not_called_complete(copied: Path) -> None:
    encode(copied)
    maintenance.drop(copied, RESIDUAL_SAE)
    with pytest.raises(InvalidInput, match=f"firings/{RESIDUAL_SAE} was made by this command and dropped"):
        encode(copied)
    assert encode(copied, [tiny_world().residual_sae]).complete


def test_sites_of_two_passes_are_two_sources(tmp_path: Path) -> None:
    out = stored(tmp_path / "a.act", sites=["ln2.1"], with_index=False)
    stored(out, sites=["mlp_out.1"], dataset=None, into=True, predictions=False, with_index=False)
    outcome = encode(out, [coders()[3]])
    reader = StoreReader(out)
    recipe = Recipe.from_json(reader.passes[outcome.pass_id].recipe)
    owners = {site: reader.passes[reader.layout.artifacts[f"sites/{site}"]] for site in ("ln2.1", "mlp_out.1")}
    assert {one.site: one.digest for one in recipe.sources} == {
        site: made.recipe_digest for site, made in owners.items()
    }
    assert len({one.digest for one in recipe.sources}) == 2


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
