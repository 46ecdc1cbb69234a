"""A seeded store for the lens' benchmark: one document, one random site, a random unembedding of any size."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from workload import DIGEST, corpus_of, model_that_is_nowhere

from actstore.blocks import TOKEN_FIELDS, MatrixSpec, ShardBlock, TokenShard
from actstore.corpus import CorpusBatch
from actstore.corpus.layout import DocumentRow
from actstore.maintenance import index
from actstore.models import ModelFacts
from actstore.recipe import ModelIdentity, Recipe
from actstore.store import PassFile, PassWriter, StoreFile, StoreWriter, pack_texts, write_piece

__all__ = ["NORM_EPSILON", "PLAIN_FILE", "SITE", "SOFTCAP", "STORE", "write"]

STORE, PLAIN_FILE, SITE = "lens.act", "unembedding.npy", "resid_post.0"
SOFTCAP, NORM_EPSILON = 30.0, 1e-6
SHARD_ROWS, ROWS_AT_ONCE = 1024, 4096
DEVIATION = 0.08  # of an unembedding's numbers: logits then spread by a few units, as a model's do

Unembedding = npt.NDArray[Any]


def write(home: Path, vocabulary: int, width: int, tokens: int) -> int:
    """Write the store and its index, and beside it the unembedding as one plain file; return that file's bytes."""
    weight = write_plain(home / PLAIN_FILE, vocabulary, width)
    root, facts, identity = home / STORE, facts_of(vocabulary, width), model_that_is_nowhere("random")
    StoreWriter.prepare(root)
    store = StoreFile(
        shard_rows=SHARD_ROWS,
        batch_tokens=4096,
        context=tokens,
        stride=tokens,
        tokenizer={"name": "none", "digest": DIGEST, "bos_id": None, "special_ids": []},
        model={"identity": asdict(identity), "facts": asdict(facts)},
        vocabulary=write_piece(root, pack_texts([f"t{number}" for number in range(vocabulary)]), {}),
        created="2026-01-01T00:00:00+00:00",
        versions={},
    )
    writer = StoreWriter.create(root, store)
    writer.write_segment([document(vocabulary, tokens)], lambda: {"documents_digest": DIGEST, "max_tokens": None})
    write_site(writer, recipe_of(identity, tokens), write_unembedding(root, weight), width, tokens)
    index(root)
    return weight.nbytes


def write_plain(path: Path, vocabulary: int, width: int) -> Unembedding:
    """Write bfloat16 normal numbers as unsigned integers (token, width), a block at a time; return them mapped."""
    random = np.random.default_rng(0)
    weight = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(vocabulary, width))
    for first in range(0, vocabulary, ROWS_AT_ONCE):
        part = weight[first : first + ROWS_AT_ONCE]
        block = random.standard_normal(part.shape, dtype=np.float32) * np.float32(DEVIATION)
        part[...] = block.astype(ml_dtypes.bfloat16).view(np.uint16)
    weight.flush()
    return np.asarray(weight)


def write_unembedding(root: Path, weight: Unembedding) -> str:
    """Write the kit's piece; return its digest."""
    arrays: dict[str, tuple[npt.NDArray[Any], tuple[str, ...]]] = {
        "weight": (weight.view(ml_dtypes.bfloat16), ("token", "width")),
        "gain": (np.ones(weight.shape[1], np.float32), ("width",)),
    }
    attributes = {"piece": "unembedding", "norm": "rms", "norm_epsilon": NORM_EPSILON, "softcap": SOFTCAP}
    return write_piece(root, arrays, attributes)


def document(vocabulary: int, tokens: int) -> CorpusBatch:
    """Return one document of random tokens, one sequence."""
    fields = {name: np.zeros(tokens, np.int32) for name in TOKEN_FIELDS}
    fields["token_id"] = np.random.default_rng(1).integers(0, vocabulary, tokens, dtype=np.int32)
    fields["pos"], fields["role"] = np.arange(tokens, dtype=np.int32), np.full(tokens, -1, np.int32)
    values = np.full((SHARD_ROWS, len(TOKEN_FIELDS)), -1, np.int32)
    values[:tokens] = np.stack([fields[name] for name in TOKEN_FIELDS], axis=1)
    row = DocumentRow("random", "{}", tokens, 0)
    return CorpusBatch((row,), np.array([[0, 0, tokens]], np.int64), (TokenShard(0, values),))


def write_site(writer: StoreWriter, recipe: Recipe, unembedding: str, width: int, tokens: int) -> None:
    """Write a pass with one site of bfloat16 normal numbers."""
    spec = MatrixSpec(f"sites/{SITE}", width, "bfloat16", "width")
    values = np.full((SHARD_ROWS, width), np.nan, ml_dtypes.bfloat16)
    values[:tokens] = np.random.default_rng(2).standard_normal((tokens, width), dtype=np.float32)
    pass_id = recipe.digest[:16]
    writer.begin_pass(pass_id, PassFile(recipe.to_json(), (spec,), (), {"unembedding": unembedding}))
    passing = PassWriter(writer, pass_id)
    passing.commit(ShardBlock(0, tokens, {spec.path: values}, {}))
    passing.seal()


def facts_of(vocabulary: int, width: int) -> ModelFacts:
    """Return the sizes of a model of one layer."""
    return ModelFacts(
        name="random",
        architecture="Gemma2ForCausalLM",
        n_layers=1,
        d_model=width,
        n_heads=1,
        n_kv_heads=1,
        d_head=width,
        d_mlp=width,
        vocabulary_size=vocabulary,
        final_softcap=SOFTCAP,
        norm_eps=NORM_EPSILON,
        checkpoint_dtype="bfloat16",
        n_parameters=vocabulary * width,
    )


def recipe_of(model: ModelIdentity, tokens: int) -> Recipe:
    """Return the recipe of the pass that stores the site."""
    corpus = corpus_of(tokens, SHARD_ROWS, batch_tokens=4096)
    return Recipe(
        model=model,
        corpus=corpus,
        sites=(SITE,),
        predictions=False,
        compute_dtype="bfloat16",
        storage_dtype="bfloat16",
    )
