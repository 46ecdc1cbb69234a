"""Before the model runs: the store opened or made, its corpus stored, the recipe known, the pass begun."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from actstore.blocks import FiringsSpec, MatrixSpec, TokenShard
from actstore.corpus import TokenizerHandle
from actstore.health import HealthCheck
from actstore.models import LoadedModel
from actstore.progress import Report
from actstore.recipe import Recipe
from actstore.saes import Encoder
from actstore.store import PassFile, StoreFile, StoreReader, StoreWriter

from . import identity
from .checks import check_window
from .corpus import digest_of_dataset, store_segment
from .directions import Directions, directions_of, way_of, written_site
from .kit import kit_writers, write_feature_logits, write_vocabulary
from .plan import check_disk
from .planning import estimate_of
from .proof import prove_saes
from .proof_rows import RowsOfModel
from .request import DEFAULT_BATCH_TOKENS, DEFAULT_SHARD_ROWS, Request
from .rounding import rounding_checks
from .specs import firings_of, matrices_of

__all__ = ["Opening"]

VERSIONED = ("actstore", "zarr", "numcodecs", "numpy", "torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Opening:
    """Everything that is loaded for an extraction; its methods need the store's lock."""

    request: Request
    model: LoadedModel
    tokenizer: TokenizerHandle
    encoders: Sequence[Encoder]
    report: Report

    def open_or_create(self) -> StoreWriter:
        """Return the store, made anew where there is none, or one that a run left before it had any text."""
        out = self.request.out
        if StoreWriter.prepare(out):
            writer = StoreWriter.open(out)
            if writer.layout.segments:
                check_window(self.request, writer.store)
                writer.repair_metadata()
                return writer
        return StoreWriter.create(out, self._store_file())

    def _store_file(self) -> StoreFile:
        request, tokenizer, facts = self.request, self.tokenizer, self.model.facts
        window = request.window
        texts = tokenizer.vocabulary()
        # The model may embed ids that the tokenizer never gives, and predict them: they have no text.
        padded = texts + [""] * (facts.vocabulary_size - len(texts))
        return StoreFile(
            shard_rows=request.shard_rows or DEFAULT_SHARD_ROWS,
            batch_tokens=request.batch_tokens or DEFAULT_BATCH_TOKENS,
            context=window.context,
            stride=window.text_stride(has_bos=tokenizer.bos_id is not None),
            tokenizer={
                "name": _name_of(request.tokenizer, facts.name),
                "digest": tokenizer.digest,
                "bos_id": tokenizer.bos_id,
                "special_ids": sorted(tokenizer.special_ids),
            },
            model={"identity": asdict(self.model.identity), "facts": asdict(facts)},
            vocabulary=write_vocabulary(request.out, padded),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={name: importlib.metadata.version(name) for name in VERSIONED},
        )

    def recipe(self, writer: StoreWriter) -> Recipe:
        """Return the request's recipe, the corpus stored; raises RecipeMismatch where the store has another."""
        request, is_new = self.request, not writer.layout.segments
        if is_new:
            store_segment(writer, request, request.dataset, self.tokenizer, self.report)
        first, stored_max = writer.layout.segments[0], self._stored_max_tokens(0)
        digest, max_tokens = first.documents_digest, stored_max
        if request.dataset is not None and not is_new:  # standard input can be read once
            max_tokens = stored_max if request.append is not None else request.max_tokens
            digest = digest_of_dataset(
                request, request.dataset, self.tokenizer, first.n_docs, cut=stored_max is not None
            )
        corpus = identity.corpus_identity(writer.store, self.tokenizer, digest, max_tokens)
        saes = [encoder.identity for encoder in self.encoders]
        recipe = identity.make_recipe(
            request, self.model, self.model.identity, self.model.dtype, saes, corpus, writer.layout
        )
        identity.find_pass(recipe, writer.store, writer.layout, StoreReader(request.out).passes, request)
        if identity.pass_id_of(recipe) not in writer.layout.passes:  # before a segment is added to what will be refused
            identity.refuse_again(PassFile(recipe.to_json(), *self._makes(recipe)), writer.layout)
        return recipe

    def _makes(self, recipe: Recipe) -> tuple[tuple[MatrixSpec, ...], tuple[FiringsSpec, ...]]:
        """Return what a pass with this recipe will hold."""
        return matrices_of(recipe, self.model.site_width, self.model.sites()), firings_of(recipe)

    def _stored_max_tokens(self, segment: int) -> int | None:
        stored: int | None = StoreReader(self.request.out).corpus_manifests[segment]["describe"]["max_tokens"]
        return stored

    def append(self, writer: StoreWriter) -> None:
        """Store a further segment, unless the last one is this very data: then an earlier run died after storing it."""
        request, last = self.request, writer.layout.segments[-1]
        if len(writer.layout.segments) > 1 and self._stored_max_tokens(last.segment) == request.max_tokens:
            cut = request.max_tokens is not None
            digest = digest_of_dataset(request, request.append, self.tokenizer, last.n_docs, cut=cut)
            if digest == last.documents_digest:
                return
        store_segment(writer, request, request.append, self.tokenizer, self.report)

    def check_space(self, writer: StoreWriter, recipe: Recipe, pending: Sequence[int]) -> None:
        """Say what the shards that are still to be made will take; raises NoSpace where the disk may not hold it."""
        n_rows = int(StoreReader(self.request.out).rows_used[list(pending)].sum())
        plan = estimate_of(self.request, self.model, recipe, writer.layout.n_docs, n_rows, len(pending))
        self.report(f"plan: {plan}", 0, None, "")
        check_disk(plan, force=self.request.force)

    def begin(self, writer: StoreWriter, recipe: Recipe, model_checks: Sequence[HealthCheck]) -> None:
        """Prove the SAEs, write the kit, and declare the pass."""
        request = self.request
        matrices, firings = self._makes(recipe)
        rows = RowsOfModel(self.model, recipe, _shards(request), writer.store.batch_tokens)
        sae_checks = prove_saes(rows, self.encoders, allow_unhealthy=request.allow_unhealthy)
        made = PassFile(
            recipe=recipe.to_json(),
            matrices=matrices,
            firings=firings,
            kit=self._kit(recipe),
            files=write_feature_logits(request.out, self.model.unembedding(), self._directions()),
            health=tuple(check.to_json() for check in (*model_checks, *sae_checks, *rounding_checks(rows, recipe))),
        )
        writer.begin_pass(identity.pass_id_of(recipe), made)

    def _directions(self) -> dict[str, Directions | None]:
        ways = [way_of(self.model, written_site(encoder)) for encoder in self.encoders]
        return {
            encoder.identity.sae: directions_of(way, encoder, self.model.device)
            for encoder, way in zip(self.encoders, ways, strict=True)
        }

    def complete_kit(self, writer: StoreWriter, recipe: Recipe) -> None:
        """Write what the kit of a pass that was begun before lacks: SAE weights left out, pieces that came later."""
        pass_id = identity.pass_id_of(recipe)
        if pieces := self._kit(recipe, without=StoreReader(self.request.out).passes[pass_id].kit):
            writer.add_to_kit(pass_id, pieces)

    def _kit(self, recipe: Recipe, without: Container[str] = ()) -> dict[str, str]:
        writers = kit_writers(self.model, recipe, self.encoders, sae_weights=self.request.sae_weights)
        return {name: write(self.request.out) for name, write in writers.items() if name not in without}


def _name_of(tokenizer: Any, model_name: str) -> str:
    """Return what to call the tokenizer: a hub id as it is, a folder by its own name, else as the model."""
    if isinstance(tokenizer, (str, Path)):
        return Path(tokenizer).resolve().name if Path(tokenizer).exists() else str(tokenizer)
    return model_name


def _shards(request: Request) -> Iterable[TokenShard]:
    reader = StoreReader(request.out)
    return (TokenShard(shard, reader.tokens(shard)) for shard in range(reader.layout.n_shards))
