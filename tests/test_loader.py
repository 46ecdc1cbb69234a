"""Rows for training: every wanted row once, the numbers that are stored, in an order that can be had again."""

from __future__ import annotations

import copy
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_world
import torch
import zarr
from asking_support import SmallStore, Truth
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.api import Store
from actstore.errors import InvalidInput, UnknownName
from actstore.loader import RowLoader
from actstore.row_order import RowOrder
from actstore.saes import SaeEncoder, expand_sae_arguments, load_sae
from actstore.store import StoreReader

SITE, OTHER = "resid_post.3", "z.2"
ORDERS = st.fixed_dictionaries(
    {
        "batch_rows": st.integers(3, 700),
        "seed": st.integers(0, 3),
        "buffer_shards": st.integers(1, 9),
        "plain_only": st.booleans(),
        "drop_last": st.booleans(),
    }
)


def rows_of(loader: Any) -> list[np.ndarray]:
    """Return the row numbers of every batch of one epoch."""
    return [batch["row"].numpy() for batch in loader]


def made(store: Store, **options: Any) -> Any:
    return store.loader(SITE, with_rows=True, **options)


def joined(batches: list[np.ndarray]) -> np.ndarray:
    return np.asarray(np.concatenate([*batches, np.empty(0, np.int64)]))


@pytest.fixture(scope="module")
def plain_rows(small: SmallStore) -> np.ndarray:
    rows: np.ndarray = small.truth.rows[small.truth.plain]
    return rows


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_plain_row_comes_once_an_epoch_and_each_epoch_has_its_order(
    opened: Store, plain_rows: np.ndarray, num_workers: int
) -> None:
    loader = made(opened, batch_rows=100, buffer_shards=2, num_workers=num_workers)
    first, second = joined(rows_of(loader)), joined(rows_of(loader))
    for rows in (first, second):
        np.testing.assert_array_equal(np.sort(rows), plain_rows)
    assert (first != second).any()
    assert loader.epoch == 2


@settings(max_examples=25, deadline=None)
@given(options=ORDERS, world_size=st.integers(1, 4))
def test_ranks_share_no_row_and_leave_none_out(opened: Store, options: dict[str, Any], world_size: int) -> None:
    truth = Truth(opened.reader)
    wanted = truth.rows[truth.plain] if options["plain_only"] else truth.rows
    ranks = [made(opened, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    lengths = [len(one) for one in ranks]
    batches = [rows_of(one) for one in ranks]
    assert [len(one) for one in batches] == lengths
    rows = joined([rows for one in batches for rows in one])
    assert len(np.unique(rows)) == len(rows)
    assert np.isin(rows, wanted).all()
    sizes = [len(rows) for one in batches for rows in one[:-1]]
    assert set(sizes) <= {options["batch_rows"]}
    if options["drop_last"]:
        assert all(len(rows) == options["batch_rows"] for one in batches for rows in one)
        assert len(wanted) - len(rows) < options["batch_rows"] * world_size
    else:
        assert len(rows) == len(wanted)


@settings(max_examples=25, deadline=None)
@given(options=ORDERS, epoch=st.integers(0, 1), share=st.floats(0, 1), world_size=st.integers(1, 3))
def test_a_resumed_loader_gives_the_same_remaining_bytes(
    opened: Store, options: dict[str, Any], epoch: int, share: float, world_size: int
) -> None:
    options |= {"world_size": world_size, "rank": world_size - 1}
    loader = made(opened, **options)
    for _ in range(epoch):
        rows_of(loader)
    whole, states = [], [loader.state_dict()]
    for batch in loader:
        whole.append(batch)
        states.append(loader.state_dict())
    n_done = int(share * len(whole))
    resumed = made(opened, **options)
    resumed.load_state_dict(json.loads(json.dumps(states[n_done])))
    assert resumed.state_dict() == states[n_done]
    rest = list(resumed)
    assert len(rest) == len(whole) - n_done
    for again, before in zip(rest, whole[n_done:], strict=True):
        assert {name: one.numpy().tobytes() for name, one in again.items()} == {
            name: one.numpy().tobytes() for name, one in before.items()
        }
    assert resumed.epoch == loader.epoch == epoch + 1
    np.testing.assert_array_equal(joined(rows_of(resumed)), joined(rows_of(loader)))  # and so on, epoch after epoch


@pytest.mark.parametrize("n_done", [0, 1, 7, 8])
def test_a_loader_with_workers_resumes_too(opened: Store, n_done: int) -> None:
    options: dict[str, Any] = {"batch_rows": 64, "buffer_shards": 1, "num_workers": 2}
    whole, loader = rows_of(made(opened, **options)), made(opened, **options)
    batches = iter(loader)
    for _ in range(n_done):
        next(batches)
    state = loader.state_dict()  # workers have made more than was given out
    del batches
    resumed = made(opened, **options)
    resumed.load_state_dict(state)
    rest = rows_of(resumed)
    assert [rows.tolist() for rows in rest] == [rows.tolist() for rows in whole[n_done:]]


def test_workers_share_no_row_and_each_reads_its_shards(opened: Store, plain_rows: np.ndarray) -> None:
    loader = made(opened, batch_rows=50, buffer_shards=1, num_workers=2)
    batches = rows_of(loader)
    shards = [set((rows // opened.reader.shard_rows).tolist()) for rows in batches]
    ours, theirs = set().union(*shards[0:8:2]), set().union(*shards[1:8:2])
    assert not ours & theirs
    np.testing.assert_array_equal(np.sort(joined(batches)), plain_rows)


@pytest.mark.parametrize("n_streams", [2, 3, 5, 9])
def test_batches_depend_on_the_number_of_workers_and_not_on_who_makes_them(
    opened: Store, plain_rows: np.ndarray, n_streams: int
) -> None:
    """Streams of uneven lengths, some of them empty, made here by one process."""
    numbers: dict[str, Any] = {"batch_rows": 70, "seed": 4, "buffer_shards": 1, "rank": 0, "world_size": 1}
    order = RowOrder(**numbers, plain_only=True, drop_last=False, n_streams=n_streams)
    batches = rows_of(RowLoader(opened.reader, [SITE], order))
    np.testing.assert_array_equal(np.sort(joined(batches)), plain_rows)
    if n_streams == 2:
        by_workers = rows_of(made(opened, **numbers, num_workers=2))
        assert [rows.tolist() for rows in by_workers] == [rows.tolist() for rows in batches]


def test_runs_are_the_same_and_seeds_differ(opened: Store) -> None:
    first, again = (joined(rows_of(made(opened, seed=5))) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != joined(rows_of(made(opened, seed=6)))).any()


def test_rows_are_shuffled_across_the_shards_of_a_buffer(opened: Store) -> None:
    batch = next(iter(made(opened, batch_rows=200, buffer_shards=3)))
    assert len(torch.unique(batch["row"] // opened.reader.shard_rows)) == 3


def test_values_are_those_of_the_raw_arrays_and_sites_are_aligned(small: SmallStore, opened: Store) -> None:
    home = small.path / "arrays" / "sites"
    raw = {site: np.asarray(zarr.open_array(home / site, mode="r")[:]) for site in (SITE, OTHER)}
    n_seen = 0
    for batch in opened.loader([SITE, OTHER], batch_rows=333, buffer_shards=2, plain_only=False):
        rows = batch["row"].numpy()
        for site, array in raw.items():
            assert batch[site].dtype == torch.float32
            np.testing.assert_array_equal(batch[site].numpy(), array[rows])
        n_seen += len(rows)
    assert n_seen == opened.reader.layout.n_rows


def test_one_site_alone_is_a_tensor(opened: Store) -> None:
    (alone,) = opened.loader(SITE, batch_rows=10**6, buffer_shards=100)
    (with_rows,) = made(opened, batch_rows=10**6, buffer_shards=100)
    assert torch.equal(alone, with_rows[SITE])
    assert alone.shape == (len(with_rows["row"]), 128)


def test_the_stored_type_is_given_where_it_is_asked_for(tmp_path: Path) -> None:
    tiny_world.extract(tmp_path / "half.act", storage_dtype="bfloat16")
    with Store(tmp_path / "half.act") as store:
        raw: Any = store["resid_post.1"].zarr[:]
        assert raw.dtype == ml_dtypes.bfloat16
        for dtype, expected in (("stored", torch.bfloat16), ("float32", torch.float32)):
            for batch in store.loader("resid_post.1", 50, with_rows=True, dtype=dtype):
                assert batch["resid_post.1"].dtype == expected
                numbers = raw[batch["row"].numpy()].astype(np.float32)
                np.testing.assert_array_equal(batch["resid_post.1"].float().numpy(), numbers)


def test_filler_is_never_read(copied: Callable[[], Path]) -> None:
    """Filler is NaN on the disk: a batch that had some of it would show."""
    with Store(copied()) as store:
        array = store[SITE].zarr
        assert np.isnan(array[:]).any(), "the store has filler"
        for batch in store.loader(SITE, plain_only=False):
            assert not batch.isnan().any()


def test_only_a_buffer_of_shards_is_held(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    matrix: Any = StoreReader.matrix

    def watched(self: StoreReader, path: str, shard: int) -> np.ndarray:
        if path.startswith("sites/"):
            read.append(shard)
        values: np.ndarray = matrix(self, path, shard)
        return values

    monkeypatch.setattr(StoreReader, "matrix", watched)
    batches = iter(made(opened, batch_rows=64, buffer_shards=2))
    next(batches)
    assert len(read) == 2
    list(batches)
    assert len(read) == len(set(read)) == opened.reader.layout.n_shards, "each shard is read once"
    held = sum(values.nbytes for values in made(opened, buffer_shards=2).dataset._read(0, (0, 1)).values())
    assert held <= 2 * opened.reader.shard_rows * (128 * 4 + 8)


def test_an_epoch_that_was_left_begins_again(opened: Store) -> None:
    loader = made(opened, batch_rows=100)
    first = next(iter(loader))["row"]
    assert torch.equal(next(iter(loader))["row"], first)


def test_the_callers_random_numbers_stay_as_they_are(opened: Store) -> None:
    before = torch.get_rng_state()
    rows_of(made(opened))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch_rows": 65},
        {"buffer_shards": 2},
        {"world_size": 2},
        {"dtype": "stored"},
        {"plain_only": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_state_of_another_loader_is_refused(opened: Store, change: dict[str, Any]) -> None:
    state = made(opened, batch_rows=64).state_dict()
    with pytest.raises(InvalidInput, match=f"{next(iter(change))} was"):
        made(opened, **{"batch_rows": 64, **change}).load_state_dict(state)


def test_the_state_of_another_store_is_refused(opened: Store, tmp_path: Path) -> None:
    tiny_world.extract(tmp_path / "other.act", sites=[SITE.replace("3", "1")])
    with Store(tmp_path / "other.act") as other:
        state = other.loader("resid_post.1", with_rows=True).state_dict()
    with pytest.raises(InvalidInput, match="stored was"):
        made(opened).load_state_dict(copy.deepcopy(state))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"batch_rows": 0}, "batch_rows is 0.*1 or more", id="no rows a batch"),
        pytest.param({"seed": -1}, "seed is -1", id="negative seed"),
        pytest.param({"rank": 2, "world_size": 2}, "rank is 2 of 2", id="rank past the world"),
        pytest.param({"world_size": 1000}, "cannot be dealt to 1000 ranks", id="more ranks than shards"),
        pytest.param({"dtype": "float16"}, "'float16'.*float32 or stored", id="dtype"),
    ],
)
def test_numbers_that_cannot_be_are_refused(opened: Store, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        opened.loader(SITE, **options)


def test_unknown_and_missing_sites_are_refused(opened: Store) -> None:
    with pytest.raises(UnknownName, match=r"resid_post\.30"):
        opened.loader("resid_post.30")
    with pytest.raises(InvalidInput, match="No site"):
        opened.loader([])


def test_the_example_trains_an_sae_that_actstore_reads(
    small: SmallStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """examples/train_sae.py, shorter: what it saved says its site, and encodes the stored rows as it learned to."""
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "train_sae.py"))
    given = [str(small.path), SITE, "--out", str(tmp_path / "mine"), "--features", "200", "-k", "12", "--steps", "150"]
    example["main"]([*given, "--batch-rows", "256"])
    fvu = float(capsys.readouterr().out.partition("variance unexplained: ")[2].split()[0])
    assert fvu < 0.3
    (found,) = expand_sae_arguments([str(tmp_path / "mine")])
    coder = load_sae(found)
    assert (found.sae, str(found.site), coder.k, coder.d_sae) == (f"{SITE}-mine", SITE, 12, 200)
    rows = small.truth.matrix(f"sites/{SITE}")[small.truth.plain]
    tile = SaeEncoder(coder, "cpu").encode(torch.from_numpy(rows))
    errors = float(tile.reconstruction[:, 2].double().square().sum())
    assert errors / np.square(rows - rows.mean(0), dtype=np.float64).sum() == pytest.approx(fvu, rel=1e-3)
    assert tile.counts.max() <= 12
