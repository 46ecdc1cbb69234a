"""A store grows and shrinks: what is added changes nothing that was there, what is dropped is gone and nothing else."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_support import (
    copy_of_finished,
    extract_some,
    finished,
    hashes,
    index_content,
    same_bits,
    truth,
)
from tiny_world import ATTENTION_SAE, RESIDUAL_SAE, extract, tiny_world

from actstore import maintenance
from actstore.api import Store
from actstore.errors import InvalidInput, StoreBusy, UnknownName
from actstore.store import PassWriter, StoreReader, StoreWriter

SITE = "sites/resid_post.1"
FIRINGS = f"firings/{RESIDUAL_SAE}"
SECOND: dict[str, Any] = {"dataset": None, "sites": [], "lens_k": 0, "lens_sites": [], "into": True}
BOOKKEEPING = ("layout.json", "index/CURRENT", "lock", "index.lock", "claims.lock")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return copy_of_finished(tmp_path)


def changed(before: dict[str, str], after: dict[str, str], *, but: tuple[str, ...] = BOOKKEEPING) -> list[str]:
    """Return the files that were there and are not the same any more, without those that may change."""
    names = [name for name, digest in before.items() if after.get(name) != digest]
    return [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in but)]


def count(store: Path, table: str, where: str = "true") -> int:
    with Store(store) as opened:
        return int(opened.sql(f"SELECT count(*) AS n FROM {table} WHERE {where}").arrow()["n"][0].as_py())


# Adding


def test_a_second_sae_changes_no_file_that_was_there(store: Path) -> None:
    before = hashes(store)

    assert extract(store, saes=[tiny_world().attention_sae], **SECOND).complete

    assert changed(before, hashes(store)) == []
    assert maintenance.verify(store).faults == []
    assert count(store, "activations", f"sae = '{ATTENTION_SAE}'") > 0
    assert count(store, "activations", f"sae = '{RESIDUAL_SAE}'") == len_of_firings(store, RESIDUAL_SAE)


def len_of_firings(store: Path, sae: str) -> int:
    reader = StoreReader(store)
    return sum(len(reader.firings(sae, shard).features) for shard in reader.done(f"firings/{sae}"))


def test_a_second_sae_is_what_it_would_have_been_in_the_first_pass(store: Path, tmp_path: Path) -> None:
    extract(store, saes=[tiny_world().attention_sae], with_index=False, **SECOND)
    world = tiny_world()
    extract(tmp_path / "both", saes=[world.residual_sae, world.attention_sae], with_index=False)

    assert truth(store) == truth(tmp_path / "both")


def test_more_documents_only_lengthen_the_arrays(store: Path) -> None:
    before, first = hashes(store), StoreReader(store)
    metadata = {name: json.loads((store / name).read_bytes()) for name in before if name.endswith("zarr.json")}

    assert extract(store, append=str(tiny_world().more)).complete

    lengthened = [name for name in changed(before, hashes(store)) if not name.startswith("index/")]
    assert all(name.endswith("zarr.json") for name in lengthened)
    for name in lengthened:
        was, now = metadata[name], json.loads((store / name).read_bytes())
        assert now.pop("shape")[0] > was.pop("shape")[0]
        assert now == was
    assert changed(before, hashes(store), but=(*BOOKKEEPING, *lengthened)) == []
    reader = StoreReader(store)
    assert reader.layout.n_shards > first.layout.n_shards
    assert list(reader.done(SITE)) == list(range(reader.layout.n_shards))
    assert maintenance.verify(store).faults == []


def test_appended_documents_are_read_like_the_first(store: Path) -> None:
    texts = [json.loads(line)["text"] for line in tiny_world().more.read_text().splitlines()]
    n_before = StoreReader(store).layout.n_docs

    extract(store, append=str(tiny_world().more))
    reader = StoreReader(store)

    assert [row["text"] for batch in reader.documents(1) for row in batch.to_pylist()] == texts
    assert reader.document_text(n_before) == texts[0]
    first_row = int(reader.sequences(1)[0, 1])
    assert np.isfinite(reader.gather(SITE, np.array([first_row, 0, first_row]))).all()
    assert count(store, "tokens") == reader.layout.n_rows
    assert count(store, "documents", "segment = 1") == len(texts)


def test_appending_again_what_was_appended_last_adds_nothing(store: Path) -> None:
    extract(store, append=str(tiny_world().more), with_index=False)
    before = truth(store)

    extract(store, append=str(tiny_world().more), with_index=False)

    assert truth(store) == before


def test_rows_of_old_shards_are_the_same_after_appending(store: Path) -> None:
    old = StoreReader(store)
    rows = np.arange(int(old.rows_used[0]))
    before = old.gather(SITE, rows)

    extract(store, append=str(tiny_world().more), with_index=False)

    assert same_bits(StoreReader(store).gather(SITE, rows), before)
    assert same_bits(old.gather(SITE, rows), before), "a reader keeps its snapshot"
    assert old.layout.n_shards == len(old.rows_used) == len(StoreReader(finished()).rows_used)


# Dropping

ARTIFACTS = {
    "site": ("resid_post.1", SITE, [f"arrays/{SITE}"], "sites"),
    "firings": (RESIDUAL_SAE, FIRINGS, [FIRINGS, f"arrays/reconstruction/{RESIDUAL_SAE}"], "saes"),
    "predictions": ("predictions", "predictions", ["arrays/predictions"], "predictions"),
    "lens": ("lens/logit/resid_post.0", "lens/logit/resid_post.0", ["arrays/lens/logit/resid_post.0"], "lens_summary"),
}


@pytest.mark.parametrize(("asked", "artifact", "homes", "table"), ARTIFACTS.values(), ids=ARTIFACTS)
def test_a_dropped_artifact_is_gone_and_nothing_else(
    store: Path, asked: str, artifact: str, homes: list[str], table: str
) -> None:
    before, content = hashes(store), index_content(store)
    gone = {name for name in before if name.startswith(tuple(f"{home}/" for home in homes))}
    assert gone
    kits = [made.kit.items() for made in StoreReader(store).passes.values()]
    gone |= {f"kit/{digest}.zip" for kit in kits for name, digest in kit if f"sae/{asked}" == name}

    assert maintenance.drop(store, asked) == artifact

    after = hashes(store)
    assert gone.isdisjoint(after)
    assert [name for name in changed(before, after) if name not in gone and not name.startswith("index/")] == []
    assert artifact not in StoreReader(store).layout.artifacts
    assert count(store, table) == 0
    assert [name for name, rows in index_content(store).items() if rows != content[name]] == tables_of(artifact)
    found = maintenance.verify(store)
    assert (found.faults, found.orphans) == ([], [])


def tables_of(artifact: str) -> list[str]:
    """Return the tables that lose rows with an artifact."""
    kind = artifact.partition("/")[0]
    of_firings = ["saes", "health", "activations", "features", "examples", "feature_logits", "reconstruction"]
    lost = {"sites": ["sites"], "firings": of_firings, "lens": ["lens_tokens", "lens_summary"]}.get(kind, [kind])
    return [table for table in index_content(finished()) if table in lost]


def test_a_dropped_artifact_is_refused_by_readers_with_what_there_is(store: Path) -> None:
    maintenance.drop(store, "resid_post.1")

    with pytest.raises(UnknownName, match=FIRINGS):
        StoreReader(store).matrix(SITE, 0)
    with pytest.raises(UnknownName, match="There is no artifact"):
        maintenance.drop(store, "resid_post.1")


def test_what_was_dropped_can_be_added_again(store: Path) -> None:
    before, content = truth(store), index_content(store)
    maintenance.drop(store, RESIDUAL_SAE)

    extract(store, saes=[tiny_world().residual_sae], **SECOND)

    assert truth(store) == before
    assert index_content(store)["activations"] == content["activations"]
    found = maintenance.verify(store)
    assert (found.faults, [name for name in found.orphans if not name.startswith("index/")]) == ([], [])


def test_what_was_proved_of_a_dropped_sae_goes_with_it(store: Path) -> None:
    """Its id may be another SAE's by now, and a check of either would be taken for the other's."""

    def proved() -> list[str]:
        return [row for row in index_content(store)["health"] if RESIDUAL_SAE in row]

    before = proved()
    maintenance.drop(store, RESIDUAL_SAE)
    assert before and not proved()

    extract(store, saes=[tiny_world().residual_sae], **SECOND)

    assert proved() == before


def test_a_pass_of_one_artifact_can_be_dropped_and_made_again(store: Path) -> None:
    before = truth(store)
    options = SECOND | {"saes": [tiny_world().attention_sae], "with_index": False}
    extract(store, **options)
    complete = truth(store)

    maintenance.drop(store, ATTENTION_SAE)
    assert truth(store) == before
    assert len(StoreReader(store).passes) == 1
    extract(store, **options)

    assert truth(store) == complete
    assert maintenance.verify(store).ok


def test_when_all_is_dropped_the_store_still_has_its_corpus_and_takes_no_other(store: Path, tmp_path: Path) -> None:
    before = truth(store)
    for _, artifact, *_ in ARTIFACTS.values():
        StoreWriter.open(store).drop(artifact)
    assert StoreReader(store).passes == {}

    with pytest.raises(InvalidInput, match=r"corpus\.documents_digest"):
        extract(store, dataset=str(tiny_world().more))
    extract(store, with_index=False)

    assert truth(store) == before


def test_documents_appended_later_do_not_bring_back_what_was_dropped(store: Path) -> None:
    maintenance.drop(store, RESIDUAL_SAE)
    extract(store, saes=[tiny_world().residual_sae], activation_bits=20, with_index=False, **SECOND)

    options = SECOND | {"saes": [tiny_world().residual_sae], "activation_bits": 20, "with_index": False}
    extract(store, append=str(tiny_world().more), **options)
    extract(store, with_index=False)

    found = maintenance.verify(store)
    assert (found.faults, [name for name in found.orphans if not name.startswith("index/")]) == ([], [])
    reader = StoreReader(store)
    assert list(reader.done(FIRINGS)) == list(range(reader.layout.n_shards))


def test_an_artifact_of_an_unfinished_pass_is_dropped_and_the_rest_resumes(tmp_path: Path) -> None:
    extract_some(tmp_path / "s", 2)

    maintenance.drop(tmp_path / "s", RESIDUAL_SAE)

    assert not (tmp_path / "s" / "firings" / RESIDUAL_SAE).exists()
    assert extract(tmp_path / "s").complete
    assert f"firings/{RESIDUAL_SAE}" not in StoreReader(tmp_path / "s").layout.artifacts
    assert maintenance.verify(tmp_path / "s").ok


def test_nothing_is_dropped_while_somebody_extracts(tmp_path: Path) -> None:
    extract_some(tmp_path / "s", 2)
    pass_id = StoreWriter.open(tmp_path / "s").layout.passes[0]
    claim = PassWriter(StoreWriter.open(tmp_path / "s"), pass_id).claim(5)
    assert claim is not None
    with claim:
        before = hashes(tmp_path / "s")
        with pytest.raises(StoreBusy):
            maintenance.drop(tmp_path / "s", RESIDUAL_SAE)
        assert hashes(tmp_path / "s") == before


def test_predictions_are_not_taken_for_an_sae_of_that_name(tmp_path: Path) -> None:
    folder = tiny_world().folder / "residual"
    extract(tmp_path / "s", saes=[f"predictions={folder}@resid_post.1"], with_index=False)

    StoreWriter.open(tmp_path / "s").drop("predictions")

    assert (tmp_path / "s/arrays/reconstruction/predictions/c.0.0").exists()
    assert maintenance.verify(tmp_path / "s").ok
