"""A format is known by the files that are there, on this machine and on the hub; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from saes_support import plain_tensors, random_arrays, write_llama_scope, write_sae, write_saelens, write_sparsify

from actstore.errors import InvalidInput, MissingInput
from actstore.saes import expand_sae_arguments, load_sae, sae_sizes
from actstore.sites import Site


def _site(source: Path, site: str = "") -> str:
    return str(expand_sae_arguments([f"{source}{site}"])[0].site)


def test_a_folder_of_two_formats_is_not_guessed(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, plain_tensors())
    np.savez(folder / "params.npz", allow_pickle=False, **random_arrays())
    with pytest.raises(
        InvalidInput, match=r"several SAEs: params\.npz, sae_weights\.safetensors.*name one of the files"
    ):
        _site(folder)
    assert _site(folder / "sae_weights.safetensors") == "resid_pre.3"
    assert _site(folder / "params.npz", "@z.1") == "z.1"


def test_weights_without_their_configuration_are_refused(tmp_path: Path) -> None:
    folder = write_saelens(tmp_path, plain_tensors())
    (folder / "cfg.json").unlink()
    for source in (folder, folder / "sae_weights.safetensors", folder.parent):
        with pytest.raises(MissingInput, match=r"without cfg\.json, which says how to read it"):
            _site(source)


def test_a_configuration_that_went_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_saelens(tmp_path, plain_tensors())
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    (folder / "cfg.json").unlink()
    with pytest.raises(MissingInput, match=r"cfg\.json is not there"):
        _site(folder / "sae_weights.safetensors")


def test_formats_mix_below_one_folder(tmp_path: Path) -> None:
    write_sae(tmp_path)
    write_saelens(tmp_path, plain_tensors())
    write_sparsify(tmp_path, "layers.10")
    write_sparsify(tmp_path, "layers.9")
    write_llama_scope(tmp_path)
    found = {str(sae.site): sae.place.format.name for sae in expand_sae_arguments([str(tmp_path)])}
    assert found == {
        "resid_post.15": "Llama Scope",
        "resid_post.9": "sparsify",
        "resid_post.10": "sparsify",
        "resid_pre.3": "SAELens",
        "resid_post.3": "Gemma Scope",
    }
    assert [str(sae.site) for sae in expand_sae_arguments([f"{tmp_path}/layers.*"])] == [
        "resid_post.9",
        "resid_post.10",
    ]


LISTING = ["README.md", "blocks.3/cfg.json", "blocks.3/sae_weights.safetensors", "root.json"]


def _serve(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Let the hub be one local folder; return what is fetched of it."""
    fetched: list[str] = []

    def fetch(repository: str, path: str) -> str:
        fetched.append(path)
        snapshot = folder.parent / "snapshots" / "commit" / path
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.write_bytes((folder / Path(path).name).read_bytes())
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: LISTING)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repository, path: None)
    return fetched


@pytest.mark.parametrize("source", ["own/repo/blocks.3", "own/repo/*", "own/repo/blocks.3/sae_weights.safetensors"])
def test_a_format_on_the_hub_is_known_by_its_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    fetched = _serve(monkeypatch, write_saelens(tmp_path, plain_tensors()))
    (found,) = expand_sae_arguments([source])
    assert (found.site, sae_sizes(found).width, fetched) == (Site("resid_pre", 3), 48, ["blocks.3/cfg.json"])
    identity = load_sae(found).identity
    assert (identity.release, identity.sae_id, identity.revision) == ("own/repo", "blocks.3", "commit")


def test_a_folder_on_the_hub_without_an_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _serve(monkeypatch, write_saelens(tmp_path, plain_tensors()))
    with pytest.raises(MissingInput, match="own/repo/other holds no SAE"):
        expand_sae_arguments(["own/repo/other"])


def test_what_is_in_the_cache_needs_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "89abcdef0123456789abcdef0123456789abcdef"
    repository = tmp_path / "models--own--repo"
    folder = write_saelens(repository / "snapshots" / commit, plain_tensors())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (found,) = expand_sae_arguments([f"own/repo/{folder.name}"])
    assert load_sae(found).identity.revision == commit
    with pytest.raises(MissingInput, match="its list of files of own/repo is not in the hub's cache"):
        expand_sae_arguments(["own/repo/other"])


def test_a_hub_out_of_reach_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from httpx2 import ConnectError

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    with pytest.raises(MissingInput, match="could not be asked \\(ConnectError\\), and there is no such local path"):
        expand_sae_arguments(["nowhere/at/all"])


def test_an_sae_at_the_root_of_a_repository_is_named_by_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = _serve(monkeypatch, write_saelens(tmp_path, plain_tensors()))
    identity = load_sae(expand_sae_arguments(["own/repo/sae_weights.safetensors"])[0]).identity
    assert (fetched, identity.sae_id, identity.sae) == (
        ["cfg.json", "sae_weights.safetensors"],
        None,
        "resid_pre.3-repo",
    )
