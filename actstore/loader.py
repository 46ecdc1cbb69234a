"""Stored rows for training: a torch DataLoader that reads shards, shuffles a few at a time, and resumes exactly.

A rank's shards are shuffled and dealt to streams, one per worker. A stream reads `buffer_shards` shards at a time and
shuffles their rows; its batches are cut from what follows. So every batch is a function of what was asked for and its
number: any of them can be made again, and nothing larger than the buffer is ever in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .blocks import TOKEN_FIELDS, is_plain
from .errors import InvalidInput, explain
from .row_order import ROWS, RowOrder, Stream, permutation
from .sealed import digest_of
from .store import StoreReader
from .tensors import as_tensor

__all__ = ["Batch", "RowLoader", "make_loader"]

Batch = Any  # a tensor (row, width), or a dict of tensors by site: the caller knows which was asked for
Place = tuple[int, int, int]  # epoch, stream, number of the batch in it
Rows = npt.NDArray[np.int64]
DTYPES = ("float32", "stored")
ROW = "row"
_FLAGS = TOKEN_FIELDS.index("flags")


class RowBatches(Dataset[Batch]):
    """Batches by their place; in each process it keeps one buffer, so that places in order read every shard once."""

    def __init__(self, reader: StoreReader, sites: Sequence[str], order: RowOrder, dtype: str, as_dict: bool) -> None:
        self.sites, self.order, self.dtype, self.as_dict = tuple(sites), order, dtype, as_dict
        self.shards = _shards_of(reader, self.sites)
        self.n_rows = {shard: _n_rows(reader, shard, order.plain_only) for shard in self.shards}
        self._url = reader.location.url
        self._opened = (os.getpid(), reader)
        self._planned: tuple[int, list[Stream]] | None = None
        self._kept: tuple[Any, dict[str, npt.NDArray[Any]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_kept": None}

    def plan(self, epoch: int) -> list[Stream]:
        """Return this rank's streams in an epoch."""
        if self._planned is None or self._planned[0] != epoch:
            streams = self.order.streams(self.shards, epoch)
            self._planned = (epoch, [Stream.of(shards, self.n_rows, self.order) for shards in streams])
        return self._planned[1]

    def __getitem__(self, place: Place) -> Batch:
        epoch, stream, number = place
        parts = [
            {name: self._given(column[here]) for name, column in self._buffer(epoch, group).items()}
            for group, here in self.plan(epoch)[stream].groups_of(number * self.order.batch_rows, self.order.batch_rows)
        ]
        columns = {name: as_tensor(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        return columns if self.as_dict else columns[self.sites[0]]

    def _given(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return a copy: a view would keep its whole buffer while the next one is read."""
        return values.copy() if self.dtype == "stored" or values.dtype == np.int64 else values.astype(np.float32)

    def _buffer(self, epoch: int, group: tuple[int, ...]) -> dict[str, npt.NDArray[Any]]:
        """Return a group's rows, shuffled: each site (row, width) in its stored dtype, and the row numbers if asked."""
        if self._kept is None or self._kept[0] != (epoch, group):
            self._kept = None  # first let go of the last group: two would be twice the memory
            self._kept = ((epoch, group), self._read(epoch, group))
        return self._kept[1]

    def _read(self, epoch: int, group: tuple[int, ...]) -> dict[str, npt.NDArray[Any]]:
        order = permutation(sum(self.n_rows[shard] for shard in group), self.order.seed, epoch, ROWS, group[0])
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        columns: dict[str, npt.NDArray[Any]] = {}
        begin = 0
        for shard in group:
            here = places[begin : begin + self.n_rows[shard]]
            for name, values in self._shard(shard):
                if name not in columns:
                    columns[name] = np.empty((len(order), *values.shape[1:]), values.dtype)
                columns[name][here] = values
            begin += self.n_rows[shard]
        return columns

    def _shard(self, shard: int) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Yield each column of a shard, one at a time in memory: its rows that are wanted, in order."""
        reader = self._reader()
        wanted = _wanted(reader, shard, self.order.plain_only)
        for site in self.sites:
            yield site, reader.matrix(f"sites/{site}", shard)[wanted]
        if self.as_dict:
            yield ROW, shard * reader.shard_rows + wanted

    def _reader(self) -> StoreReader:
        """Return this process's own reader: what a parent had open is not shared."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), StoreReader(self._url))
        return self._opened[1]


def _shards_of(reader: StoreReader, sites: Sequence[str]) -> list[int]:
    """Return the shards that every one of these sites has."""
    return sorted(set.intersection(*(set(reader.done(f"sites/{site}")) for site in sites)))


def _wanted(reader: StoreReader, shard: int, plain_only: bool) -> Rows:
    """Return which rows of a shard are read, counted from its first; filler never is."""
    if plain_only:
        return np.flatnonzero(is_plain(reader.tokens(shard)[:, _FLAGS])).astype(np.int64)
    return np.arange(reader.rows_used[shard], dtype=np.int64)


def _n_rows(reader: StoreReader, shard: int, plain_only: bool) -> int:
    return len(_wanted(reader, shard, plain_only)) if plain_only else int(reader.rows_used[shard])


class _Places(Sampler[Place]):
    """The places of an epoch's batches, streams by turns, from the batch on that comes next."""

    def __init__(self, batches: RowBatches) -> None:
        self.batches, self.epoch, self.first = batches, 0, 0

    def __iter__(self) -> Iterator[Place]:
        lengths = self._lengths()
        turns = ((number, stream) for number in range(max(lengths)) for stream in range(len(lengths)))
        places = ((self.epoch, stream, number) for number, stream in turns if number < lengths[stream])
        return islice(places, self.first, None)

    def __len__(self) -> int:
        return sum(self._lengths())

    def _lengths(self) -> list[int]:
        """Return the number of batches of each stream."""
        return [self.batches.order.n_batches(int(stream.bounds[-1])) for stream in self.batches.plan(self.epoch)]


class RowLoader(DataLoader[Batch]):
    """Batches of stored rows, epoch after epoch; made by `Store.loader`.

    One `for` over it is an epoch, each in another order; one that was left begins again, unless its state was loaded.
    `len` is the number of batches of the epoch that comes next.
    """

    def __init__(
        self,
        reader: StoreReader,
        sites: Sequence[str],
        order: RowOrder,
        *,
        dtype: str = "float32",
        as_dict: bool = True,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        """Take the store, its sites by name and the order; `options` are those of torch's DataLoader.

        Raises InvalidInput for no site, a dtype other than float32 or stored, or where some rank would have no shard.
        """
        if dtype not in DTYPES:
            raise InvalidInput(explain(f"The dtype is {dtype!r}", accepted=" or ".join(DTYPES)))
        if not sites:
            raise InvalidInput(explain("No site is given", accepted="a stored site, or a list of them"))
        batches = RowBatches(reader, sites, order, dtype, as_dict)
        if len(batches.shards) < order.world_size:
            what = f"{len(batches.shards)} shards cannot be dealt to {order.world_size} ranks"
            raise InvalidInput(explain(what, accepted="a world_size of at most the shards that are stored"))
        self._places, self._n_done = _Places(batches), 0
        self._identity = {
            **asdict(order),
            "dtype": dtype,
            "stored": digest_of({site: list(reader.done(f"sites/{site}").items()) for site in batches.sites}),
        }
        # A generator of its own: torch draws from it at every epoch, and the caller's random numbers stay as they are.
        fixed: dict[str, Any] = {"batch_size": None, "sampler": self._places, "generator": torch.Generator()}
        super().__init__(batches, num_workers=num_workers, **fixed, **options)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self._places.epoch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its own iterator's class
        self._n_done = self._places.first
        batches = super().__iter__()
        self._places.first = 0
        for batch in batches:
            self._n_done += 1
            yield batch
        self._places.epoch, self._n_done = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, as plain JSON values; batches that workers hold ready are not done."""
        return {"epoch": self.epoch, "batches_done": self._n_done, "order": dict(self._identity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where another loader of the same rows stood: the next `for` gives what that one had left of its epoch.

        Raises InvalidInput, naming what differs, where the batches would not be the same.
        """
        other = dict(state["order"])
        differing = sorted(key for key in self._identity | other if self._identity.get(key) != other.get(key))
        if differing:
            what = "; ".join(f"{key} was {other.get(key)!r} and is {self._identity.get(key)!r}" for key in differing)
            next_step = "make the loader as it was; `stored` says that shards were added or made anew since"
            raise InvalidInput(explain(f"The state is of another loader: {what}", next_step=next_step))
        self._places.epoch, self._places.first = int(state["epoch"]), int(state["batches_done"])
        self._n_done = self._places.first


def make_loader(
    reader: StoreReader,
    sites: str | Sequence[str],
    batch_rows: int = 4096,
    seed: int = 0,
    *,
    plain_only: bool = True,
    with_rows: bool = False,
    dtype: str = "float32",
    buffer_shards: int = 4,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    **options: Any,
) -> RowLoader:
    """Return a loader over stored sites: a name for tensors, a list for dicts of aligned tensors.

    plain_only: leave special, template and repeated tokens out. with_rows: a dict with int64 `row` for one site too.
    dtype: "float32" or "stored". buffer_shards: so many shards are in memory, of each worker, and their rows are
    shuffled together. rank, world_size: whole shards are dealt to ranks, then to workers, so `len` may differ between
    ranks. The order follows from all of these but dtype. Raises as `RowLoader` and `RowOrder`.
    """
    order = RowOrder(
        batch_rows=batch_rows,
        seed=seed,
        buffer_shards=buffer_shards,
        plain_only=plain_only,
        drop_last=drop_last,
        rank=rank,
        world_size=world_size,
        n_streams=max(1, num_workers),
    )
    as_dict = with_rows or not isinstance(sites, str)
    names = [sites] if isinstance(sites, str) else list(sites)
    return RowLoader(reader, names, order, dtype=dtype, as_dict=as_dict, num_workers=num_workers, **options)
