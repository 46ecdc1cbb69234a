"""The small tables of the SQL contract, as rows: what a store says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actstore.recipe import Recipe
from actstore.sealed import canonical_json
from actstore.sites import parse_site

from .layout import Layout, PassFile, StoreFile

__all__ = ["sae_rows", "site_rows", "small_tables"]

Receipts = Mapping[str, Mapping[int, Mapping[str, Any]]]


def small_tables(
    store: StoreFile,
    layout: Layout,
    passes: Mapping[str, PassFile],
    receipts: Receipts,
    manifests: Sequence[Mapping[str, Any]],
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of `store`, `passes`, `sites`, `saes` and `health`; which lenses, attention, roles there are."""
    return {
        "store": [_store(store, layout, receipts)],
        "passes": [_pass(one, made, layout, receipts) for one, made in passes.items()],
        "sites": site_rows(layout, passes),
        "saes": sae_rows(layout, passes),
        "lenses": _lenses(layout),
        "attention": _attention(layout, passes),
        "roles": _roles(manifests),
        "health": _corpus_health(manifests)
        + [row for one, made in passes.items() for row in _health(one, made, layout)],
    }


def site_rows(layout: Layout, passes: Mapping[str, PassFile]) -> list[dict[str, Any]]:
    """Return the rows of `sites`; needs no receipt."""
    return [row for one, made in passes.items() for row in _sites(one, made, layout)]


def sae_rows(layout: Layout, passes: Mapping[str, PassFile]) -> list[dict[str, Any]]:
    """Return the rows of `saes`; needs no receipt."""
    return [row for one, made in passes.items() for row in _saes(one, made, layout)]


def _store(store: StoreFile, layout: Layout, receipts: Receipts) -> dict[str, Any]:
    done = set.intersection(*(set(one) for one in receipts.values())) if receipts else set()
    return {
        "model": store.model["identity"]["name"],
        "revision": store.model["identity"]["revision"],
        "tokenizer": store.tokenizer["name"],
        "shards_done": len(done),
        "shards_total": layout.n_shards,
        "versions": canonical_json(dict(store.versions)).decode(),
        "created": store.created,
    }


def _pass(pass_id: str, made: PassFile, layout: Layout, receipts: Receipts) -> dict[str, Any]:
    return {
        "pass": pass_id,
        "recipe": canonical_json(dict(made.recipe)).decode(),
        "digest": made.recipe_digest,
        "done": len(receipts[pass_id]),
        "total": layout.n_shards,
    }


def _sites(pass_id: str, made: PassFile, layout: Layout) -> list[dict[str, Any]]:
    rows = []
    for spec in made.matrices:
        if spec.path.startswith("sites/") and layout.artifacts.get(spec.path) == pass_id:
            site = parse_site(spec.path.removeprefix("sites/"))
            rows.append(
                {
                    "site": str(site),
                    "kind": site.kind,
                    "layer": site.layer,
                    "width": spec.n_columns,
                    "dtype": spec.dtype,
                    "pass": pass_id,
                }
            )
    return rows


def _saes(pass_id: str, made: PassFile, layout: Layout) -> list[dict[str, Any]]:
    return [
        {
            "sae": coder["sae"],
            "site": coder["site"],
            "layer": parse_site(coder["site"]).layer,
            "width": coder["width"],
            "d_in": coder["d_in"],
            "architecture": coder["architecture"],
            "release": coder["release"],
            "sae_id": coder["sae_id"],
            "neuronpedia_id": coder["neuronpedia_id"],
            "revision": coder["revision"],
            "sha256": coder["weights_digest"],
            "declared_l0": coder["declared_l0"],
            "write_site": coder.get("write_site"),
            "truncated_to": coder.get("truncated_to"),
            "pass": pass_id,
        }
        for coder in made.recipe["saes"]
        if layout.artifacts.get(f"firings/{coder['sae']}") == pass_id
    ]


def _health(pass_id: str, made: PassFile, layout: Layout) -> list[dict[str, Any]]:
    """Return what a pass proved, of SAEs only what is still there: the same id may be another SAE's by now."""
    saes = (coder["sae"] for coder in made.recipe["saes"])
    gone = {sae for sae in saes if layout.artifacts.get(f"firings/{sae}") != pass_id}
    of_gone = (
        check["name"].startswith("sae_") and check["subject"].partition(" @ ")[0] in gone for check in made.health
    )
    return [dict(check) for check, is_gone in zip(made.health, of_gone, strict=True) if not is_gone]


def _lenses(layout: Layout) -> list[dict[str, Any]]:
    paths = (artifact.split("/") for artifact in layout.artifacts if artifact.startswith("lens/"))
    return [{"lens": lens, "site": site} for _, lens, site in paths]


def _attention(layout: Layout, passes: Mapping[str, PassFile]) -> list[dict[str, Any]]:
    """Return the layers whose attention is stored, and the least weight of an edge that their pass wants indexed."""
    named = ((artifact.partition("/"), one) for artifact, one in layout.artifacts.items())
    owners = {int(layer): one for (kind, _, layer), one in named if kind == "attention" and layer.isdecimal()}
    return [
        {"layer": layer, "minimum": Recipe.from_json(passes[one].recipe).attention_min}
        for layer, one in sorted(owners.items())
    ]


def _roles(manifests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the roles of chats by their code; each segment continues the list of the one before."""
    names = manifests[-1]["describe"].get("roles", ()) if manifests else ()
    return [{"code": code, "role": role} for code, role in enumerate(names)]


def _corpus_health(manifests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what tokenising noticed: it is information, not a fault, but never silent."""
    rows = []
    for number, manifest in enumerate(manifests):
        for name in ("replaced_surrogates", "empty_documents"):
            count = manifest["describe"].get(name, 0)
            subject = f"segment {number}"
            harmless = name == "empty_documents"  # kept, so that document numbers are the dataset's; told, not a fault
            expected = "any number" if harmless else "0: the text is stored with U+FFFD in their place"
            ok = harmless or count == 0
            rows.append({"name": name, "subject": subject, "value": float(count), "expected": expected, "ok": ok})
    return rows
