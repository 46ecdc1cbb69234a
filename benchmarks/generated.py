"""A seeded store of any number of firings, made without a model: by the writers that an extraction uses.

python benchmarks/generated.py STORE [--firings 12e6] [--saes 1] [--parts 1]

Documents of 200 tokens; on every plain row about 80 of 16,384 features, whose frequencies fall like Zipf's law; an
activation is a random half. Which features fire comes from a few shards that are repeated, all else is new in each.
With several parts the index is built as often while the shards are written, as it is while an extraction runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from workload import DIGEST, corpus_of, model_that_is_nowhere

from actstore.blocks import (
    FLAG_SPECIAL,
    RECONSTRUCTION_VALUES,
    TOKEN_FIELDS,
    FiringsSpec,
    MatrixSpec,
    RowFirings,
    ShardBlock,
    TokenShard,
)
from actstore.corpus import CorpusBatch
from actstore.corpus.layout import DocumentRow
from actstore.maintenance import index
from actstore.models import ModelFacts
from actstore.recipe import Recipe, SaeIdentity
from actstore.store import PassFile, PassWriter, StoreFile, StoreWriter, pack_texts, write_piece

__all__ = ["Shape", "feature_firings", "firings_of", "generate", "sae_name", "snippet_of"]

NAME = "generated"
DOCUMENT_ROWS, VOCABULARY, FIRINGS_PER_ROW = 200, 8_192, 80
N_VALUES, SHARDS_DRAWN = len(RECONSTRUCTION_VALUES), 4
TOKEN_CHARACTERS = 5  # every token is a space and a word of four letters


@dataclass(frozen=True)
class Shape:
    """How much there is: firings of each SAE, SAEs, features of an SAE, parts of each SAE's index; rows of a shard."""

    firings: float = 12e6
    saes: int = 1
    features: int = 16_384
    parts: int = 1
    shard_rows: int = 16_384

    @property
    def n_shards(self) -> int:
        return max(self.parts, round(self.firings / FIRINGS_PER_ROW / self.rows_used))

    @property
    def documents_per_shard(self) -> int:
        return self.shard_rows // DOCUMENT_ROWS

    @property
    def rows_used(self) -> int:
        return self.documents_per_shard * DOCUMENT_ROWS


def sae_name(number: int) -> str:
    """Return the id of an SAE by its number."""
    return f"{number}-generated-res-16k"


def generate(root: Path, shape: Shape) -> None:
    """Write a store and its index."""
    StoreWriter.prepare(root)
    writer = StoreWriter.create(root, _store_file(root, shape))
    writer.write_segment(_documents(shape), lambda: {"documents_digest": DIGEST, "max_tokens": None})
    names = [sae_name(number) for number in range(shape.saes)]
    matrices = [
        MatrixSpec(f"reconstruction/{sae}", N_VALUES, "float32", "field", RECONSTRUCTION_VALUES) for sae in names
    ]
    recipe = _recipe(names, shape)
    pass_id = recipe.digest[:16]
    specs = tuple(FiringsSpec(sae, shape.features) for sae in names)
    writer.begin_pass(pass_id, PassFile(recipe.to_json(), tuple(matrices), specs))
    passing = PassWriter(writer, pass_id)
    for shards in np.array_split(np.arange(shape.n_shards), shape.parts):
        for shard in shards.tolist():
            passing.commit(_block(shard, shape))
        index(root)
    passing.seal()


def firings_of(number: int, shard: int, shape: Shape) -> RowFirings:
    """Return the firings of an SAE, by its number, on one shard."""
    indptr, features = _drawn((number + shard) % SHARDS_DRAWN, shape)
    random = np.random.default_rng([number, shard])
    halves = random.integers(0x3000, 0x5C00, len(features), dtype=np.uint16).view(np.float16)  # 0.125 to 256
    return RowFirings(indptr, features, halves.astype(np.float32))


def feature_firings(number: int, feature: int, shape: Shape) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return row and activation of every firing of one feature, by row: what the store must say of it."""
    rows, activations = [], []
    for shard in range(shape.n_shards):
        firings = firings_of(number, shard, shape)
        here = np.flatnonzero(firings.features == feature)
        rows.append(np.searchsorted(firings.indptr, here, side="right") - 1 + shard * shape.shard_rows)
        activations.append(firings.activations[here])
    return np.concatenate(rows), np.concatenate(activations)


def snippet_of(row: int, before: int, after: int, shape: Shape) -> str:
    """Return a row's token, marked, among so many tokens of its document before and after it."""
    shard, place = divmod(row, shape.shard_rows)
    doc, pos = divmod(place, DOCUMENT_ROWS)
    texts = ["", *(_words()[number] for number in _token_ids(shard, shape)[doc, 1:])]
    around = "".join(texts[max(0, pos - before) : pos]), "".join(texts[pos + 1 : pos + after + 1])
    return f"{around[0]}«{texts[pos]}»{around[1]}"


@cache
def _drawn(seed: int, shape: Shape) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
    """Return bounds of rows and features of a shard of firings: about so many a row, none where it is special."""
    random = np.random.default_rng(seed)
    reached = np.cumsum(1 / (40 + np.arange(shape.features)))
    rows = np.repeat(np.arange(shape.rows_used), FIRINGS_PER_ROW + 1)
    rows = rows[rows % DOCUMENT_ROWS != 0]
    features = np.searchsorted(reached, random.random(len(rows)) * reached[-1])
    keys = np.unique(rows * shape.features + features)
    counts = np.bincount(keys // shape.features, minlength=shape.shard_rows)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), (keys % shape.features).astype(np.uint16)


def _block(shard: int, shape: Shape) -> ShardBlock:
    firings = {sae_name(number): firings_of(number, shard, shape) for number in range(shape.saes)}
    matrices = {}
    for sae, one in firings.items():
        values = np.full((shape.shard_rows, N_VALUES), np.nan, np.float32)
        values[: shape.rows_used, 0], values[: shape.rows_used, 1:] = np.diff(one.indptr)[: shape.rows_used], 1
        matrices[f"reconstruction/{sae}"] = values
    return ShardBlock(shard, shape.rows_used, matrices, firings)


def _token_ids(shard: int, shape: Shape) -> npt.NDArray[np.int64]:
    """Return the tokens of a shard's documents: (document, row); the first is the begin of the sequence."""
    size = (shape.documents_per_shard, DOCUMENT_ROWS)
    ids = np.random.default_rng([1, shard]).integers(1, VOCABULARY, size)
    ids[:, 0] = 0
    return ids


def _documents(shape: Shape) -> Iterator[CorpusBatch]:
    """Yield a shard of documents at a time: words of four letters, after each begin of a sequence."""
    words, n_docs = np.array(_words()), shape.documents_per_shard
    for shard in range(shape.n_shards):
        ids = _token_ids(shard, shape)
        metadata = f'{{"shard":{shard}}}'
        texts = ["".join(line) for line in words[ids[:, 1:]]]
        documents = tuple(DocumentRow(text, metadata, DOCUMENT_ROWS, 0) for text in texts)
        numbers = np.arange(n_docs, dtype=np.int64)
        columns = [numbers + shard * n_docs, numbers * DOCUMENT_ROWS + shard * shape.shard_rows]
        sequences = np.stack([*columns, np.full(n_docs, DOCUMENT_ROWS)], axis=1)
        yield CorpusBatch(documents, sequences, (TokenShard(shard, _tokens(shard, ids, shape)),))


def _tokens(shard: int, ids: npt.NDArray[np.int64], shape: Shape) -> npt.NDArray[np.int32]:
    rows = np.arange(shape.rows_used)
    pos = rows % DOCUMENT_ROWS
    fields = {
        "token_id": ids.reshape(-1),
        "seq": shard * shape.documents_per_shard + rows // DOCUMENT_ROWS,
        "pos": pos,
        "char_start": np.maximum(pos - 1, 0) * TOKEN_CHARACTERS,
        "char_end": pos * TOKEN_CHARACTERS,
        "flags": np.where(pos == 0, FLAG_SPECIAL, 0),
        "role": np.full(len(rows), -1),
    }
    values = np.full((shape.shard_rows, len(TOKEN_FIELDS)), -1, np.int32)
    values[: len(rows)] = np.stack([fields[name] for name in TOKEN_FIELDS], axis=1)
    return values


@cache
def _words() -> list[str]:
    letters = np.array(list("abcdefghijklmnop"))
    places = np.arange(VOCABULARY)[:, None] // 16 ** np.arange(4) % 16
    return ["<bos>", *(" " + "".join(word) for word in letters[places[1:]])]


def _store_file(root: Path, shape: Shape) -> StoreFile:
    facts = ModelFacts(
        name="generated",
        architecture="Gemma2ForCausalLM",
        n_layers=32,
        d_model=64,
        n_heads=1,
        n_kv_heads=1,
        d_head=64,
        d_mlp=64,
        vocabulary_size=VOCABULARY,
        final_softcap=None,
        norm_eps=1e-6,
        checkpoint_dtype="float32",
        n_parameters=0,
    )
    return StoreFile(
        shard_rows=shape.shard_rows,
        batch_tokens=8192,
        context=DOCUMENT_ROWS,
        stride=DOCUMENT_ROWS,
        tokenizer={"name": NAME, "digest": DIGEST, "bos_id": 0, "special_ids": [0]},
        model={"identity": asdict(model_that_is_nowhere(NAME)), "facts": asdict(facts)},
        vocabulary=write_piece(root, pack_texts(_words()), {}),
        created="2026-01-01T00:00:00+00:00",
        versions={},
    )


def _recipe(saes: list[str], shape: Shape) -> Recipe:
    corpus = corpus_of(DOCUMENT_ROWS, shape.shard_rows, batch_tokens=8192)
    common: dict[str, Any] = {"width": shape.features, "d_in": 64, "architecture": "jumprelu", "weights_digest": DIGEST}
    coders = tuple(SaeIdentity(sae=sae, site=f"resid_post.{number}", **common) for number, sae in enumerate(saes))
    return Recipe(model=model_that_is_nowhere(NAME), corpus=corpus, saes=coders, predictions=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--firings", type=float, default=Shape.firings)
    parser.add_argument("--saes", type=int, default=Shape.saes)
    parser.add_argument("--parts", type=int, default=Shape.parts)
    asked = parser.parse_args()
    generate(asked.store, Shape(asked.firings, asked.saes, parts=asked.parts))


if __name__ == "__main__":
    main()
