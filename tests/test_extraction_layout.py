"""Rows that do not count never count: overlapping windows, filler full of garbage, batches that did not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking_support import ATT, MODEL, RES, SHARD_ROWS, SmallStore, Truth, request_of

import actstore
from actstore import maintenance
from actstore.api import Store
from actstore.blocks import FLAG_REPEAT, FLAG_SPECIAL
from actstore.errors import InvalidInput
from actstore.extraction.batches import plan_batches, sequences_of
from actstore.index import TABLES
from actstore.sealed import read_sealed, write_sealed
from actstore.store import StoreReader
from actstore.store.arrays import encode_shard
from actstore.store.files import matrix_file, prove_and_write
from actstore.store.layout import PassFile
from actstore.store.segments import TOKENS


def test_the_small_store_has_what_these_tests_need(small: SmallStore) -> None:
    truth = small.truth
    assert truth.reader.layout.n_shards >= 4
    assert len(truth.rows) < truth.reader.layout.n_shards * SHARD_ROWS  # filler
    assert (truth.field("flags") & FLAG_REPEAT).any()


def test_tokens_of_overlapping_windows_are_flagged_once(small: SmallStore) -> None:
    """A document's text tokens, repeats and BOS left out, are each there once."""
    truth = small.truth
    flags, start, end = truth.field("flags"), truth.field("char_start"), truth.field("char_end")
    for doc in np.unique(truth.doc):
        mine = np.flatnonzero((truth.doc == doc) & (end > start))
        spans = list(zip(start[mine].tolist(), end[mine].tolist(), truth.field("token_id")[mine].tolist(), strict=True))
        fresh = [span for span, place in zip(spans, mine, strict=True) if not flags[place] & FLAG_REPEAT]
        assert sorted(set(spans)) == sorted(set(fresh))
        if len(np.unique(truth.field("seq")[mine])) > 1 and "🙂" not in truth.text(int(doc)):
            assert len(fresh) == len(set(fresh)) < len(spans)


def test_repeats_and_specials_are_in_no_statistic_and_no_example(small: SmallStore, opened: Store) -> None:
    counted = opened.sql(
        "SELECT count(*) FROM examples JOIN tokens USING (row) WHERE is_special OR is_repeat OR is_template"
    ).scalar()
    assert counted == 0
    n_firings = opened.sql(f"SELECT sum(n_firings)::BIGINT FROM features WHERE sae = '{RES}'").scalar()
    assert n_firings == len(small.truth.plain_firings(RES).row)
    listed = opened.sql(f"SELECT count(*) FROM activations WHERE sae = '{RES}'").scalar()
    assert listed == len(small.truth.firings(RES).row) > n_firings  # repeats are listed, and not counted


# Filler


def poison(store: Path) -> int:
    """Fill the filler of every array with garbage and make the receipts agree; return how many files were changed."""
    reader = StoreReader(store)
    n_poisoned = 0
    for number, manifest in enumerate(reader.corpus_manifests):
        for shard in range(reader.layout.n_shards):
            values = whole_shard(reader, TOKENS.path, shard)
            values[int(reader.rows_used[shard]) :, 1:] = 3  # token_id stays -1: that is what makes it filler
            manifest["files"][matrix_file(TOKENS.path, shard)] = rewritten(store, TOKENS, shard, values)
            n_poisoned += 1
        write_sealed(store / f"passes/corpus/sealed-{number}.json", manifest)
    for pass_id, made in reader.passes.items():
        path = store / f"passes/{pass_id}/sealed-0.json"
        manifest = read_sealed(path)
        for shard, receipt in manifest["receipts"].items():
            for spec in PassFile.from_json(made.to_json()).matrices:
                values = whole_shard(reader, spec.path, int(shard))
                values[receipt["n_rows"] :] = 3 if spec.dtype == "int32" else 12345.0
                receipt["files"][matrix_file(spec.path, int(shard))] = rewritten(store, spec, int(shard), values)
                n_poisoned += 1
        write_sealed(path, manifest)
    return n_poisoned


def whole_shard(reader: StoreReader, path: str, shard: int) -> np.ndarray:
    return np.array(reader.array(path)[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS])


def rewritten(store: Path, spec: Any, shard: int, values: np.ndarray) -> dict[str, Any]:
    data = encode_shard(spec, values, SHARD_ROWS)
    return asdict(prove_and_write(store, matrix_file(spec.path, shard), data, [values]))


def answers(store: Store) -> dict[str, Any]:
    """Return every table and every named query, in full."""
    found = {table: store.sql(f'SELECT * FROM "{table}" ORDER BY ALL').arrow() for table in TABLES}
    queries: dict[str, dict[str, Any]] = {
        "logit_lens": {"doc": 6, "k": 2},
        "lens_trajectory": {"doc": 6},
        "max_activating": {"sae": RES, "feature": 7, "k": 150},
        "feature_stats": {"sae": ATT, "k": 96},
        "token_features": {"sae": RES, "row": int(store.sql("SELECT max(row) FROM tokens").scalar())},
        "document_features": {"sae": RES, "doc": 6},
        "surprising_tokens": {"k": 500},
    }
    for name, parameters in queries.items():
        found[name] = store.query(name, parameters).arrow()
    return found


def test_garbage_in_the_filler_changes_no_answer(small: SmallStore, opened: Store, copied: Callable[[], Path]) -> None:
    store = copied()
    assert poison(store) > 50
    for file in (store / "index").iterdir():
        file.unlink()
    maintenance.index(store)
    assert maintenance.verify(store).faults == []
    with actstore.open(store) as poisoned:
        last = int(small.truth.rows[-1])
        assert whole_shard(poisoned.reader, "sites/final", last // SHARD_ROWS)[-1, 0] == 12345.0
        expected, found = answers(opened), answers(poisoned)
        for name in expected:
            assert found[name].equals(expected[name]), name
        np.testing.assert_array_equal(poisoned["final"][:], opened["final"][:])
        found_shard, expected_shard = (store.activations(RES).shard(0).toarray() for store in (poisoned, opened))
        np.testing.assert_array_equal(found_shard, expected_shard)


# Batches


def test_batches_hold_every_row_once_and_no_more_tokens_than_allowed(small: SmallStore) -> None:
    reader = small.truth.reader
    for shard in range(reader.layout.n_shards):
        values = np.full((SHARD_ROWS, 7), -1, np.int32)
        values[: len(reader.tokens(shard))] = reader.tokens(shard)
        token_shard = actstore.blocks.TokenShard(shard, values)
        batches = plan_batches(token_shard, 200)
        rows = np.concatenate([batch.rows for batch in batches])
        assert sorted(rows.tolist()) == list(range(token_shard.n_rows))
        assert all(batch.token_ids.size <= 200 or batch.n_sequences == 1 for batch in batches)
        assert sum(batch.n_sequences for batch in batches) == len(sequences_of(token_shard).starts)
        for batch in batches:
            real = batch.attention_mask.astype(bool)
            np.testing.assert_array_equal(batch.token_ids[real], token_shard.column("token_id")[batch.rows])


@pytest.mark.parametrize("batch_tokens", [1, 100, 256, 2048, 8192])
def test_padding_costs_little_where_lengths_are_ragged(batch_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 120, size=100)
    values = np.full((int(lengths.sum()), 7), 0, np.int32)
    values[:, 1] = np.repeat(np.arange(100), lengths)
    batches = plan_batches(actstore.blocks.TokenShard(0, values), batch_tokens)
    assert sorted(np.concatenate([batch.rows for batch in batches]).tolist()) == list(range(len(values)))
    for batch, after in zip(batches, [*batches[1:], None], strict=True):
        held = batch.attention_mask.sum(axis=1)
        longest = batch.token_ids.shape[1]
        assert held.max() == longest and (batch.token_ids.size <= batch_tokens or batch.n_sequences == 1)
        for place in range(1, len(held)):  # what was taken in was alike, or the batch was still small
            assert 10 * held[place] >= 9 * longest or 8 * place * longest < batch_tokens
        if after is not None:  # and nothing was left out that could have been taken in
            following = after.token_ids.shape[1]
            is_full = (batch.n_sequences + 1) * longest > batch_tokens
            assert is_full or (10 * following < 9 * longest and 8 * batch.token_ids.size >= batch_tokens)


def failing_forward(monkeypatch: pytest.MonkeyPatch, error: Exception, fails: Callable[[int, int], bool]) -> list[int]:
    """Make the model run out of memory where `fails(call, sequences)`; return the sequences of each call."""
    from actstore.models import LoadedModel

    calls: list[int] = []
    run = LoadedModel.capture

    def capture(self: Any, token_ids: torch.Tensor, *rest: Any, **options: Any) -> None:
        calls.append(len(token_ids))
        if fails(len(calls), len(token_ids)):
            raise error
        run(self, token_ids, *rest, **options)

    monkeypatch.setattr(LoadedModel, "capture", capture)
    return calls


OUT_OF_MEMORY = [
    pytest.param(torch.OutOfMemoryError("CUDA out of memory."), id="the class that CUDA raises"),
    pytest.param(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), id="the CPU's sentence"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_halved_and_recorded(
    small: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    seen: list[int] = []

    def fails(_call: int, n_sequences: int) -> bool:
        # The first large batch of the pass itself; the proof before it runs on few sequences.
        large = n_sequences > 15 and not seen
        seen.extend([n_sequences] * large)
        return large

    failing_forward(monkeypatch, error, fails)
    options = request_of({}) | {"sites": ["resid_post.3"], "lens_k": 0}
    actstore.extract(MODEL, small.documents, out=tmp_path / "split.act", **options)
    split = Truth(StoreReader(tmp_path / "split.act"))
    receipts = next(iter(split.reader.receipts.values()))
    splits = [one for receipt in receipts.values() for one in receipt["provenance"]["memory_splits"]]
    assert [one["n_sequences"] for one in splits] == seen
    found, expected = split.matrix("sites/resid_post.3"), small.truth.matrix("sites/resid_post.3")
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    (unsplit,) = small.truth.reader.receipts.values()
    assert not any(one["provenance"]["memory_splits"] for one in unsplit.values())


def test_one_sequence_that_does_not_fit_is_an_error_with_a_remedy(
    small: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_forward(monkeypatch, torch.OutOfMemoryError("CUDA out of memory."), lambda call, _n: call > 12)
    with pytest.raises(InvalidInput, match=r"One sequence of \d+ tokens .*--context"):
        actstore.extract(MODEL, small.documents, out=tmp_path / "x.act", sites=["z.1"], context=48, shard_rows=128)


def test_another_runtime_error_is_not_taken_for_memory(
    small: SmallStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_forward(monkeypatch, RuntimeError("a shape is wrong"), lambda _call, _n: True)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        actstore.extract(MODEL, small.documents, out=tmp_path / "x.act", sites=["z.1"], dtype="float32", device="cpu")


def test_special_rows_are_flagged_by_token_id_wherever_they_are(small: SmallStore) -> None:
    truth = small.truth
    special = truth.field("flags") & FLAG_SPECIAL == FLAG_SPECIAL
    in_text = special & (truth.field("pos") > 0)
    assert [truth.vocabulary[i] for i in truth.field("token_id")[in_text]] == ["<eos>"]
    assert special[truth.field("pos") == 0].all()
