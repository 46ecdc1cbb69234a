"""What to do next, by what a store says of itself: resume, complete, have again; and what in it is not ok."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import ActstoreError
from .health import check_text
from .recipe import Recipe, SaeIdentity
from .run_report import RunReport
from .saes import NEURONS
from .sites import parse_site
from .store import Location, StoreReader, read_runs

__all__ = ["already_done", "completing", "having_again", "how_far_it_came", "not_ok", "what_stays"]

DEFAULTS = {"activation_bits": 10, "attention_min": 0.005, "neurons_top": 64, "lens_k": 5}  # of the command line


def what_stays(store: Path) -> str:
    """Return what a run that ended early leaves in its store, and how to go on."""
    where = shlex.quote(str(store))
    try:
        reader = StoreReader(store)
        n_shards, n_docs, unfinished = reader.layout.n_shards, reader.layout.n_docs, _begun(reader)
    except ActstoreError:
        return "Nothing was stored yet."
    if not n_shards:
        return f"{where} stays, still without text: the next command with this --out begins there, or remove it."
    if not reader.passes:
        what = f"{where} stays with the text of {n_docs} documents as tokens, and nothing of the model"
        return f"{what}: a corrected command with the same text goes on from there, or remove it."
    if unfinished:
        return f"{', '.join(unfinished)} are done and stay; the same command resumes."
    return f"Every pass that was begun is complete and stays; the same command goes on, or: actstore index {where}."


def _begun(reader: StoreReader) -> list[str]:
    """Return how many shards each pass has that lacks some."""
    n_shards = reader.layout.n_shards
    done = {one: len(reader.receipts[one]) for one in reader.passes}
    return [f"{n_done} of {n_shards} shards of pass {one}" for one, n_done in done.items() if n_done < n_shards]


def already_done(store: Path) -> str | None:
    """Return what a plan over a store counts though it is made already; None where no pass is half made."""
    try:
        unfinished = _begun(StoreReader(store))
    except ActstoreError:
        return None
    if not unfinished:
        return None
    return f"Counted too is what is done: {', '.join(unfinished)}; the command of that pass makes the others."


def how_far_it_came(store: Path, since: float) -> str | None:
    """Return what this process made of its last run that began since a time; None where it finished no shard."""
    me = socket.gethostname(), os.getpid()
    mine = [run for run in read_runs(Location.of(store), since) if (run.host, run.pid) == me and run.began >= since]
    reports = [RunReport.from_json(run.report) for run in mine if run.report]
    if not reports or reports[-1] is None:
        return None
    return f"This run made {reports[-1].n_rows} tokens: {reports[-1]}"


def not_ok(store: Path, pass_id: str) -> list[str]:
    """Return what the proofs of a pass say is not ok, a line each; of a site that lost, only its own verdict."""
    checks = StoreReader(store).passes[pass_id].health
    failed = [one for one in checks if one["ok"] is False]
    failed = [one for one in failed if one["name"] != "sae_site" or "lowest of " in one["expected"]]
    return [check_text(one) for one in failed]


def having_again(store: str | Path, artifact: str) -> str:
    """Return the command that makes an artifact that was dropped, alone."""
    where, (kind, _, name) = shlex.quote(str(store)), artifact.partition("/")
    extract = f"actstore extract MODEL --into {where}"
    if kind == "lens":
        lens, _, site = name.partition("/")
        tuned = "" if lens == "logit" else f" --tuned FOLDER --name {lens}"
        return f"actstore save-lens {where}{tuned} --site {site}"
    if kind == "attention":
        return f"{extract} --attention-top K (all layers at once: drop those that are left first)"
    options = {"sites": f"--site {name}", "firings": "--sae SOURCE", "predictions": "--predictions"}
    return f"{extract} {options[kind]}"


def completing(store: Path, passes: Iterable[str], model: str | None = None) -> list[str]:
    """Return the commands that make what passes lack, in their order; those that are not told stand in capitals.

    model: where the model of the store is, as it was given; None: by its name, where that is one of the hub.
    """
    reader = StoreReader(store)
    recipes = {one: Recipe.from_json(reader.passes[one].recipe) for one in reader.passes}
    wanted = set(passes)
    return [_command(recipe, reader, store, model) for one, recipe in recipes.items() if one in wanted]


def _command(recipe: Recipe, reader: StoreReader, store: Path, model: str | None) -> str:
    if not recipe.sources:
        name = model or (recipe.model.name if "/" in recipe.model.name else "MODEL")
        words = ["actstore", "extract", name, "--into", str(store), *_extracted(recipe, reader)]
    elif recipe.saes:
        words = ["actstore", "encode", str(store), *map(_source, recipe.saes), *_firings(recipe)]
    else:
        words = ["actstore", "save-lens", str(store), *_lens(recipe)]
    return shlex.join(words)


def _extracted(recipe: Recipe, reader: StoreReader) -> Iterator[str]:
    """Yield the options of a pass of the model; all that decide its recipe are said, none is left to a default."""
    tokenizer = reader.store.tokenizer["name"]
    for option, values in (("--site", _by_kind(recipe.sites)), ("--sae", map(_source, recipe.saes))):
        for value in values:
            yield from (option, value)
    if recipe.lens_k:
        yield from ("--lens", str(recipe.lens_k))
        for site in _by_kind(recipe.lens_sites):
            yield from ("--lens-site", site)
    if recipe.attention_top:
        yield from ("--attention-top", str(recipe.attention_top))
        yield from _unless_default("attention_min", recipe.attention_min)
    yield "--predictions" if recipe.predictions else "--no-predictions"
    yield from _firings(recipe)
    yield from ("--dtype", recipe.compute_dtype)
    if recipe.storage_dtype != recipe.compute_dtype:
        yield from ("--storage-dtype", recipe.storage_dtype)
    if recipe.model.revision:
        yield from ("--revision", recipe.model.revision)
    if tokenizer != recipe.model.name:
        yield from ("--tokenizer", tokenizer)


def _firings(recipe: Recipe) -> Iterator[str]:
    yield from _unless_default("activation_bits", recipe.activation_bits)
    if kept := [coder.truncated_to for coder in recipe.saes if coder.truncated_to]:
        yield from _unless_default("neurons_top", kept[0])
    if recipe.sae_precision != Recipe.sae_precision:
        yield from ("--sae-precision", recipe.sae_precision)
    if recipe.encode_special:
        yield "--encode-special"


def _lens(recipe: Recipe) -> Iterator[str]:
    if recipe.lens_digest is not None:
        yield from ("--tuned", "FOLDER", "--name", recipe.lens_name)
    if recipe.lens_k != DEFAULTS["lens_k"]:
        yield from ("-k", str(recipe.lens_k))
    for site in _by_kind(recipe.lens_sites):
        yield from ("--site", site)


def _unless_default(name: str, value: float) -> Iterator[str]:
    if value != DEFAULTS[name]:
        yield from (f"--{name.replace('_', '-')}", str(value))


def _by_kind(sites: Iterable[str]) -> list[str]:
    """Return sites as options name them: those of a kind together, `resid_post.0,1,2`."""
    layers: dict[str, list[str]] = {}
    for site in map(parse_site, sites):
        layers.setdefault(site.kind, []).extend([] if site.layer is None else [str(site.layer)])
    return [f"{kind}.{','.join(found)}" if found else kind for kind, found in layers.items()]


def _source(coder: SaeIdentity) -> str:
    """Return an SAE as an argument; what lay in a local file is SOURCE, which nobody but its owner knows."""
    if coder.architecture == NEURONS:
        return f"{coder.sae}={NEURONS}:{coder.site}"
    sites = f"@{coder.site}>{coder.write_site}" if coder.write_site else f"@{coder.site}"
    on_hub: Any = coder.revision and coder.release and "/" in coder.release
    source = f"{coder.release}/{coder.sae_id or ''}".rstrip("/") if on_hub else "SOURCE"
    return f"{coder.sae}={source}{sites}"
