"""What a store accepts of a second command: to resume, to extend, to append; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_support import hashes
from tiny_world import RESIDUAL_SAE, extract, tiny_world

import actstore
from actstore import maintenance
from actstore.errors import InvalidInput, RecipeMismatch
from actstore.extraction import Request, plan_extraction
from actstore.store import StoreReader, StoreWriter

RESIDUAL = ["resid_post.1"]


def request(out: Path, **changes: Any) -> Request:
    world = tiny_world()
    options: dict[str, Any] = {"model": str(world.model), "dataset": str(world.dataset), "sites": ("resid_post.1",)}
    return Request(**(options | {"out": out, "device": "cpu"} | changes))


def test_the_same_command_makes_nothing_twice(tmp_path: Path) -> None:
    first = extract(tmp_path / "a.act")
    again = extract(tmp_path / "a.act")
    assert first.complete and first.n_shards_made > 2
    assert again.complete and again.n_shards_made == 0 and again.pass_id == first.pass_id


def test_another_max_tokens_is_another_recipe(tmp_path: Path) -> None:
    extract(tmp_path / "a.act", max_tokens=100)
    with pytest.raises(RecipeMismatch, match=r"corpus.max_tokens: 100 → 250"):
        extract(tmp_path / "a.act", max_tokens=250)
    assert extract(tmp_path / "a.act", max_tokens=100).n_shards_made == 0


def test_a_renamed_model_folder_with_the_same_weights_resumes(tmp_path: Path) -> None:
    (tmp_path / "renamed").symlink_to(tiny_world().model)
    first = extract(tmp_path / "a.act")
    assert extract(tmp_path / "a.act", model=str(tmp_path / "renamed")).pass_id == first.pass_id


def test_a_further_pass_that_makes_the_predictions_resumes(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract(out, predictions=False, lens_k=0, lens_sites=[])
    further: dict[str, Any] = {
        "dataset": None,
        "sites": ["z.0"],
        "saes": [],
        "lens_k": 0,
        "lens_sites": [],
        "into": True,
    }
    first = extract(out, **further)
    again = extract(out, **further)
    assert (again.pass_id, again.n_shards_made) == (first.pass_id, 0)
    assert StoreReader(out).layout.artifacts["predictions"] == first.pass_id


def test_what_was_dropped_is_not_called_complete(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract(out)
    maintenance.drop(out, "resid_post.1")
    with pytest.raises(InvalidInput, match=r"sites/resid_post.1 was made by this command and dropped.*--into"):
        extract(out)
    extract(out, dataset=None, saes=[], lens_k=0, lens_sites=[], into=True)
    with actstore.open(out) as store:
        assert store.sites == RESIDUAL and maintenance.verify(out).ok


def test_documents_appended_after_a_drop_do_not_bring_the_dropped_back(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract(out)
    maintenance.drop(out, "resid_post.1")
    extract(out, append=str(tiny_world().more))
    with actstore.open(out) as store:
        n_docs = store.reader.layout.n_docs
        assert store.sites == [] and store.sql("SELECT count(DISTINCT doc) FROM tokens").scalar() <= n_docs
    assert maintenance.verify(out).ok and not (out / "arrays" / "sites" / "resid_post.1").exists()


def test_a_pass_that_lacks_the_appended_segment_is_named(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    first = extract(out)
    extract(out, dataset=None, sites=["z.0"], saes=[], lens_k=0, lens_sites=[], into=True)
    appended = extract(out, append=str(tiny_world().more))
    assert appended.pass_id == first.pass_id
    assert [one for one in StoreReader(out).layout.passes if one != first.pass_id] == list(appended.unfinished)


def test_appending_the_same_documents_again_resumes(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract(out)
    extract(out, append=str(tiny_world().more))
    n_docs = StoreReader(out).layout.n_docs
    extract(out, append=str(tiny_world().more))
    assert StoreReader(out).layout.n_docs == n_docs


def test_a_lens_reads_the_residual_stream_alone(tmp_path: Path) -> None:
    for site in ("ln2.0", "final", "attn_out.1"):
        with pytest.raises(InvalidInput, match=f"A lens cannot read {site}"):
            extract(tmp_path / "a.act", lens_sites=[site])
    assert not (tmp_path / "a.act").exists()


def test_a_lens_of_a_site_uses_the_unembedding_of_its_own_pass(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract(out, lens_k=0, lens_sites=[])
    with actstore.open(out) as store:
        before = store.query("logit_lens", {"doc": 7, "k": 3}).arrow()
    extract(out, dataset=None, sites=["z.0"], saes=[], lens_k=0, lens_sites=[], into=True, dtype="bfloat16")
    with actstore.open(out) as store:
        assert store.query("logit_lens", {"doc": 7, "k": 3}).arrow().equals(before)


@pytest.mark.parametrize(("site", "has_logits"), [("resid_post.1", True), ("mlp_out.1", True), ("ln2.1", False)])
def test_feature_logits_are_made_where_features_are_written(tmp_path: Path, site: str, has_logits: bool) -> None:
    source = tiny_world().residual_sae.partition("=")[2].rpartition("@")[0]
    extract(tmp_path / "a.act", saes=[f"moved={source}@{site}"], lens_k=0, lens_sites=[], max_tokens=60)
    assert (StoreReader(tmp_path / "a.act").feature_logits("moved") is not None) == has_logits
    assert maintenance.verify(tmp_path / "a.act").ok


def test_the_vocabulary_covers_every_id_that_the_model_predicts(tmp_path: Path) -> None:
    extract(tmp_path / "a.act")
    reader = StoreReader(tmp_path / "a.act")
    assert len(reader.vocabulary()) == reader.store.model["facts"]["vocabulary_size"]
    with actstore.open(tmp_path / "a.act") as store:
        assert store.sql("SELECT count(*) FROM lens_tokens ANTI JOIN vocabulary USING (token_id)").scalar() == 0


def test_a_tokenizer_with_more_ids_than_the_model_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_world().model)
    tokenizer.add_tokens([f"<new{number}>" for number in range(2000)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InvalidInput, match=r"The tokenizer has \d+ ids, the model embeds \d+"):
        extract(tmp_path / "a.act", tokenizer=str(tmp_path / "tokenizer"))
    assert not (tmp_path / "a.act").exists()


def test_an_out_below_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert request(Path("~/x.act")).out == tmp_path / "x.act"


def test_a_further_pass_can_be_planned_without_a_dataset(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract(out)
    plan = plan_extraction(request(out, dataset=None, into=True, sites=("z.0",), predictions=False))
    layout = StoreReader(out).layout
    assert (plan.n_rows, plan.n_shards) == (layout.n_rows, layout.n_shards)
    assert [size.artifact for size in plan.artifacts] == ["sites/z.0"]


def test_appending_can_be_planned(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract(out)
    before = StoreReader(out).layout
    plan = plan_extraction(request(out, dataset=None, append=str(tiny_world().more)))
    extract(out, append=str(tiny_world().more))
    after = StoreReader(out).layout
    assert (plan.n_documents, plan.n_rows) == (after.n_docs - before.n_docs, after.n_rows - before.n_rows)
    assert plan.n_shards == after.n_shards - before.n_shards


def test_the_model_is_proved_again_where_a_pass_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[int] = []
    out = tmp_path / "a.act"
    extract(out)

    def prove(*_: Any) -> list[Any]:
        proved.append(1)
        return []

    monkeypatch.setattr("actstore.extraction.run.prove", prove)
    extract(out)
    assert not proved, "nothing is left to run"
    extract(out, append=str(tiny_world().more))
    assert proved


def test_overlapping_windows_give_enough_plain_rows_for_the_proof(tmp_path: Path) -> None:
    texts = [{"text": "the cat on a hat then not that boat " * 60} for _ in range(12)]
    extract(tmp_path / "a.act", dataset=texts, stride=1, shard_rows=4096, max_tokens=60_000, lens_k=0, lens_sites=[])
    checks = {check["name"]: check for check in StoreReader(tmp_path / "a.act").tables()["health"]}
    flags = StoreReader(tmp_path / "a.act").tokens(0)[:, 5]
    assert (flags == 0).mean() < 0.2
    assert checks["sae_fvu"]["subject"] == RESIDUAL_SAE and checks["sae_fvu"]["ok"] is not None


def test_rows_that_are_not_numbers_have_no_rank_and_no_best_token() -> None:
    import torch

    from actstore.extraction.readout import read_out
    from actstore.models import Unembedding

    unembedding = Unembedding(gain=torch.ones(4), weight=torch.randn(9, 4), softcap=None, norm_eps=1e-6)
    rows = torch.tensor([[1.0, 2, 3, 4], [float("nan")] * 4])
    predictions, lenses = read_out(unembedding, rows, {"x": rows}, torch.tensor([3, 5]), k=2)
    assert predictions.ids[:, 1].tolist()[1] == -1 and predictions.ids[0, 1] >= 0
    assert lenses["x"].ids[:, 0].tolist()[1] == -1 and lenses["x"].ids[0, 0] >= 1


def test_labels_outlive_a_new_index(tmp_path: Path) -> None:
    out = tmp_path / "a.act"
    extract(out)
    (tmp_path / "labels.jsonl").write_text(json.dumps({"sae": RESIDUAL_SAE, "feature": 3, "label": "cats"}) + "\n")
    maintenance.label(out, tmp_path / "labels.jsonl")
    extract(out, append=str(tiny_world().more))
    with actstore.open(out) as store:
        assert store.sql("SELECT feature, label FROM features WHERE label IS NOT NULL").rows() == [
            {"feature": 3, "label": "cats"}
        ]
        counted = store.sql("SELECT count(*) FROM activations").scalar()
        reader = store.reader
        shards = range(reader.layout.n_shards)
        assert counted == sum(int(reader.firings(RESIDUAL_SAE, shard).indptr[-1]) for shard in shards)
        assert np.isfinite(store["resid_post.1"][:10]).all()


def test_a_store_of_a_dead_first_run_is_made_anew(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        extract(tmp_path / "a.act", dataset=[""])
    extract(tmp_path / "a.act", context=16)
    assert StoreWriter.open(tmp_path / "a.act").store.context == 16


def test_a_store_made_in_two_steps_equals_the_one_made_in_one(tmp_path: Path) -> None:
    world = tiny_world()
    both: dict[str, Any] = {"sites": ["resid_post.1", "z.0"], "saes": [world.residual_sae, world.attention_sae]}
    extract(tmp_path / "one.act", **both)
    extract(tmp_path / "two.act")
    second: dict[str, Any] = {"dataset": None, "into": True, "lens_k": 0, "lens_sites": []}
    extract(tmp_path / "two.act", sites=["z.0"], saes=[world.attention_sae], **second)
    for folder in ("arrays", "firings", "kit"):
        assert hashes(tmp_path / "one.act" / folder) == hashes(tmp_path / "two.act" / folder)
    with actstore.open(tmp_path / "one.act") as one, actstore.open(tmp_path / "two.act") as two:
        for table in ("tokens", "documents", "predictions", "activations", "features", "examples", "feature_logits"):
            ordered = f"SELECT * FROM {table} ORDER BY ALL"
            assert one.sql(ordered).arrow().equals(two.sql(ordered).arrow()), table
