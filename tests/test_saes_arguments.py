"""`[ID=]SOURCE[@SITE]` becomes SAEs with an id, a site and a place; what is ambiguous is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from saes_support import INNER, write_sae

from actstore.errors import ActstoreError, InvalidInput, MissingInput, UnknownName, UnsupportedFormat
from actstore.saes import SaeArgument, expand_sae_arguments, load_sae, parse_sae_argument, sae_sizes
from actstore.sites import Site

GOOGLE = "google/gemma-scope-2b-pt-res"


def test_importing_the_room_is_light() -> None:
    program = "import sys, actstore.saes; sys.exit(any(name in sys.modules for name in ('torch', 'huggingface_hub')))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a/b/c", SaeArgument("a/b/c"), id="source"),
        pytest.param("mine=a/b/c", SaeArgument("a/b/c", "mine"), id="id"),
        pytest.param("a/b@z.5", SaeArgument("a/b", None, Site("z", 5)), id="site"),
        pytest.param("mine=a/b@blocks.5.hook_mlp_out", SaeArgument("a/b", "mine", Site("mlp_out", 5)), id="alias"),
        pytest.param("runs/lr=3/x", SaeArgument("runs/lr=3/x"), id="equals_in_a_path"),
        pytest.param("a@b/c@final", SaeArgument("a@b/c", None, Site("final")), id="last_at"),
        pytest.param(
            "a/b@ln2.5>mlp_out.5", SaeArgument("a/b", None, Site("ln2", 5), Site("mlp_out", 5)), id="transcoder"
        ),
    ],
)
def test_an_argument_is_taken_apart(text: str, expected: SaeArgument) -> None:
    assert parse_sae_argument(text) == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param("", InvalidInput, id="empty"),
        pytest.param("@resid_post.1", InvalidInput, id="no_source"),
        pytest.param("a/b@resid_post", InvalidInput, id="site_without_layer"),
        pytest.param("a/b@residual.1", UnknownName, id="unknown_site"),
        pytest.param("a/b@", InvalidInput, id="empty_site"),
        pytest.param(f"a/b@resid_post.{'9' * 5000}", InvalidInput, id="endless_layer"),
        pytest.param("a/b@>mlp_out.5", InvalidInput, id="nothing_to_read"),
        pytest.param("a/b@ln2.5>", InvalidInput, id="nothing_to_write"),
    ],
)
def test_a_malformed_argument_is_refused(text: str, error: type[ActstoreError]) -> None:
    with pytest.raises(error):
        parse_sae_argument(text)


def test_an_argument_may_be_longer_than_a_path() -> None:
    source = f"neurons:mlp_act.{','.join(map(str, range(100)))}"
    assert parse_sae_argument(f"all={source}") == SaeArgument(source, "all")


def test_a_local_path_with_equals_and_at_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3@z.1").mkdir()
    assert parse_sae_argument("lr=3@z.1") == SaeArgument("lr=3@z.1")


@pytest.mark.parametrize(
    ("path", "sae", "site", "neuronpedia"),
    [
        pytest.param(
            f"{GOOGLE}/layer_20/width_16k/average_l0_71",
            "20-gemmascope-res-16k",
            "resid_post.20",
            "gemma-2-2b/20-gemmascope-res-16k",
            id="canonical_of_google",
        ),
        pytest.param(
            f"{GOOGLE}/layer_20/width_16k/average_l0_139",
            "20-gemmascope-res-16k__l0-139",
            "resid_post.20",
            None,
            id="another_sparsity",
        ),
        pytest.param(
            "google/gemma-scope-9b-it-res/layer_9/width_131k/average_l0_121",
            "9-gemmascope-res-131k",
            "resid_post.9",
            "gemma-2-9b-it/9-gemmascope-res-131k",
            id="instruction_tuned",
        ),
        pytest.param(
            "google/gemma-scope-2b-pt-att/layer_12/width_16k/average_l0_85",
            "12-gemmascope-att-16k",
            "z.12",
            "gemma-2-2b/12-gemmascope-att-16k",
            id="attention",
        ),
        pytest.param(
            "google/gemma-scope-2b-pt-mlp/layer_12/width_16k/average_l0_41/params.npz",
            "12-gemmascope-mlp-16k__l0-41",
            "mlp_out.12",
            None,
            id="path_of_the_file",
        ),
        pytest.param(
            "somebody/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71",
            "20-gemmascope-2b-pt-res-16k__l0-71",
            "resid_post.20",
            None,
            id="somebody_elses_copy",
        ),
    ],
)
def test_a_path_says_site_and_id(path: str, sae: str, site: str, neuronpedia: str | None) -> None:
    (found,) = expand_sae_arguments([path])
    assert found.name is not None
    assert (found.sae, str(found.site), found.name.neuronpedia_id) == (sae, site, neuronpedia)


def test_a_local_release_carries_its_own_name(tmp_path: Path) -> None:
    folder = write_sae(tmp_path, "layer_3/width_1k/average_l0_12", release="gemma-scope-demo-res")
    for source in (str(folder), str(folder / "params.npz"), f"{folder}/"):
        (found,) = expand_sae_arguments([source])
        assert (found.sae, found.site) == ("3-gemmascope-demo-res-1k__l0-12", Site("resid_post", 3))


def test_a_local_mirror_of_google_is_googles(tmp_path: Path) -> None:
    folder = write_sae(tmp_path / "google", "layer_20/width_16k/average_l0_71", release="gemma-scope-2b-pt-res")
    assert expand_sae_arguments([str(folder)])[0].sae == "20-gemmascope-res-16k"


def test_a_relative_path_is_understood_by_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sae(tmp_path)
    monkeypatch.chdir(tmp_path / "tiny-scope-res" / "layer_3")
    assert expand_sae_arguments(["width_48/average_l0_12"])[0].sae == "3-tiny-scope-res-48__l0-12"


@pytest.fixture
def release(tmp_path: Path) -> Path:
    for layer in (0, 2, 10):
        for l0 in (12, 60, 140, 300):
            write_sae(tmp_path, f"layer_{layer}/width_48/average_l0_{l0}")
    return tmp_path / "tiny-scope-res"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        pytest.param("layer_*/width_48/average_l0_12", ["0-12", "2-12", "10-12"], id="glob"),
        pytest.param("layer_2/width_48/*", ["2-12", "2-60", "2-140", "2-300"], id="several_sparsities"),
        pytest.param("layer_2", ["2-12", "2-60", "2-140", "2-300"], id="folder_of_several"),
        pytest.param(
            "layer_*/width_48/canonical", ["0-60", "2-60", "10-60"], id="canonical_prefers_the_smaller_of_two"
        ),
        pytest.param("layer_10/width_48/average_l0_60/params.npz", ["10-60"], id="file"),
    ],
)
def test_several_are_expanded_in_order_of_their_numbers(release: Path, pattern: str, expected: list[str]) -> None:
    found = expand_sae_arguments([f"{release}/{pattern}"])
    assert [sae.sae.replace("-tiny-scope-res-48__l0", "") for sae in found] == expected


def test_a_folder_called_canonical_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = write_sae(tmp_path, "layer_3/width_48/canonical")
    (found,) = expand_sae_arguments([f"{folder}@resid_post.3"])
    assert (found.sae, found.name) == ("resid_post.3-canonical", None)


def test_a_path_that_says_nothing_needs_a_site(tmp_path: Path) -> None:
    folder = write_sae(tmp_path, "my sae", release="runs")
    with pytest.raises(InvalidInput, match=r"which site.*@resid_post\.12"):
        expand_sae_arguments([str(folder)])
    (found,) = expand_sae_arguments([f"{folder}@z.4"])
    assert (found.sae, found.site) == ("z.4-my-sae", Site("z", 4))
    assert expand_sae_arguments([f"mine={folder}@z.4"])[0].sae == "mine"


def test_a_release_of_unknown_kind_keeps_its_sparsity(tmp_path: Path) -> None:
    folder = write_sae(tmp_path, release="scope")
    (found,) = expand_sae_arguments([f"{folder}@ln2.3"])
    assert found.site == Site("ln2", 3) and load_sae(found).identity.declared_l0 == 12


def test_a_site_that_contradicts_the_path_is_refused(tmp_path: Path) -> None:
    folder = write_sae(tmp_path)
    assert expand_sae_arguments([f"{folder}@resid_post.3"])
    with pytest.raises(InvalidInput, match=r"resid_post\.3 by its path, and resid_pre\.3"):
        expand_sae_arguments([f"{folder}@resid_pre.3"])


def test_an_id_belongs_to_one_sae(release: Path) -> None:
    with pytest.raises(InvalidInput, match="names 3 SAEs"):
        expand_sae_arguments([f"mine={release}/layer_*/width_48/average_l0_12"])
    with pytest.raises(InvalidInput, match=r"'10-tiny-scope-res-48__l0-12' is given twice.*ANOTHER_ID="):
        expand_sae_arguments([f"{release}/layer_10", f"{release}/layer_10/width_48/average_l0_12"])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        pytest.param("no/such", MissingInput, "no SAE at no/such", id="no_path"),
        pytest.param("/no/such/folder/*", MissingInput, "no SAE at", id="empty_glob"),
        pytest.param("~nobody-of-this-name/sae", MissingInput, "no SAE at ~nobody", id="home_of_nobody"),
        pytest.param("owner--x/repo/folder", MissingInput, "owner--x/repo has no .*Cannot have --", id="no_hub_name"),
    ],
)
def test_what_is_not_there_or_not_read(source: str, error: type[ActstoreError], message: str) -> None:
    with pytest.raises(error, match=message):
        expand_sae_arguments([source])


def test_folders_of_other_formats_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"holds no SAE.*params\.npz"):
        expand_sae_arguments([str(tmp_path)])
    (tmp_path / "weights.pt").touch()
    for source in (tmp_path, tmp_path / "weights.pt"):
        with pytest.raises(UnsupportedFormat, match=r"weights\.pt.*not read yet.*params\.npz.*convert it"):
            expand_sae_arguments([str(source)])


LISTING = [
    f"{layer}/width_16k/average_l0_{l0}/{file}"
    for layer in ("layer_3", "layer_12")
    for l0 in (22, 59, 176)
    for file in ("params.npz", "README.md")
]


def test_canonical_and_globs_on_the_hub_use_its_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: LISTING)
    found = expand_sae_arguments([f"{GOOGLE}/layer_*/width_16k/canonical"])
    assert [sae.sae for sae in found] == ["3-gemmascope-res-16k", "12-gemmascope-res-16k"]
    found = expand_sae_arguments([f"{GOOGLE}/layer_3/width_16k/*"])
    assert [sae.sae.removeprefix("3-gemmascope-res-16k") for sae in found] == ["__l0-22", "", "__l0-176"]
    with pytest.raises(MissingInput, match="Nothing in google"):
        expand_sae_arguments([f"{GOOGLE}/layer_99/width_16k/canonical"])


def test_a_hub_sae_is_read_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = "89abcdef0123456789abcdef0123456789abcdef"
    repository = tmp_path / "models--owner--tiny-res"
    write_sae(repository / "snapshots", INNER, release=commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (found,) = expand_sae_arguments([f"owner/tiny-res/{INNER}"])
    identity = load_sae(found).identity
    assert (identity.release, identity.sae_id, identity.revision) == ("owner/tiny-res", INNER, commit)
    with pytest.raises(MissingInput, match=r"not in the hub's cache.*hf download"):
        load_sae(expand_sae_arguments(["owner/tiny-res/layer_4/width_48/average_l0_12"])[0])


def test_a_local_path_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sae(tmp_path / "owner", release="tiny-res")
    monkeypatch.chdir(tmp_path)
    assert expand_sae_arguments([f"owner/tiny-res/{INNER}"])[0].place.repository is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(hub_errors.GatedRepoError, "gated.*accept its terms", id="gated"),
        pytest.param(hub_errors.RepositoryNotFoundError, "neither a local path nor", id="no_repository"),
        pytest.param(hub_errors.EntryNotFoundError, "has no .*canonical", id="no_file"),
        pytest.param(hub_errors.LocalEntryNotFoundError, "could not be asked.*hf download", id="not_cached"),
        pytest.param(ConnectionError, "could not be asked.*hf download", id="offline"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    def refuse(*_args: object) -> None:
        refusal = error.__new__(error)
        refusal.args = ("the hub's own words",)
        raise refusal

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", refuse)
    with pytest.raises(MissingInput, match=message):
        load_sae(expand_sae_arguments([f"{GOOGLE}/layer_20/width_16k/average_l0_71"])[0])
    with pytest.raises(MissingInput, match=message):
        expand_sae_arguments([f"{GOOGLE}/layer_20/width_16k/canonical"])


def test_sizes_are_known_before_weights_are_read(tmp_path: Path) -> None:
    (local,) = expand_sae_arguments([str(write_sae(tmp_path))])
    assert (sae_sizes(local).width, sae_sizes(local).d_in) == (48, 10)
    (remote,) = expand_sae_arguments([f"{GOOGLE}/layer_12/width_1m/average_l0_107"])
    assert (sae_sizes(remote).width, sae_sizes(remote).d_in) == (1_048_576, None)
