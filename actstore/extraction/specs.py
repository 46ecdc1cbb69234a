"""What a recipe makes: the declarations of its arrays, from widths alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from actstore.blocks import (
    ATTENTION_VALUES,
    LENS_IDS,
    LENS_VALUES,
    PREDICTION_IDS,
    PREDICTION_VALUES,
    RECONSTRUCTION_VALUES,
    FiringsSpec,
    MatrixSpec,
    scales_path,
)
from actstore.quantised import n_groups
from actstore.recipe import QUANTISED, Recipe
from actstore.sites import Site, parse_site

__all__ = ["firings_of", "matrices_of", "stored_width"]


def stored_width(site: Site, recipe: Recipe, site_width: Callable[[Site], int]) -> int:
    """Return how many columns a site is stored with: a pattern's are its heads times the keys of a window."""
    return site_width(site) * (recipe.corpus.context if site.kind == "pattern" else 1)


def matrices_of(
    recipe: Recipe, site_width: Callable[[Site], int], sites: Iterable[Site] = ()
) -> tuple[MatrixSpec, ...]:
    """Return the matrices that a pass with this recipe writes; `sites` are the model's, whose patterns attention is."""
    specs = [spec for name in recipe.sites for spec in _site(parse_site(name), recipe, site_width)]
    specs += [_fields(f"reconstruction/{coder.sae}", "float32", RECONSTRUCTION_VALUES) for coder in recipe.saes]
    if recipe.predictions:
        specs.append(_fields("predictions/values", "float32", PREDICTION_VALUES))
        specs.append(_fields("predictions/ids", "int32", PREDICTION_IDS))
    for name in recipe.lens_sites:
        logprobs = tuple(f"logprob_{rank}" for rank in range(1, recipe.lens_k + 1))
        tokens = tuple(f"token_id_{rank}" for rank in range(1, recipe.lens_k + 1))
        specs.append(_fields(f"lens/{recipe.lens_name}/{name}/values", "float32", (*LENS_VALUES, *logprobs)))
        specs.append(_fields(f"lens/{recipe.lens_name}/{name}/ids", "int32", (*LENS_IDS, *tokens)))
    if recipe.attention_top:
        for site in (one for one in sites if one.kind == "pattern"):
            specs += _attention(f"attention/{site.layer}", site_width(site), recipe.attention_top)
    return tuple(specs)


def firings_of(recipe: Recipe) -> tuple[FiringsSpec, ...]:
    """Return the firings that a pass with this recipe writes."""
    return tuple(FiringsSpec(coder.sae, coder.width) for coder in recipe.saes)


def _site(site: Site, recipe: Recipe, site_width: Callable[[Site], int]) -> Iterator[MatrixSpec]:
    """Yield the matrix of a site, and of one that is quantised that of its scales.

    Compressing takes longer than the model does, for a quarter of the bytes; but half of a pattern is zeros.
    """
    width, compressed = stored_width(site, recipe, site_width), site.kind == "pattern"
    yield MatrixSpec(f"sites/{site}", width, recipe.storage_dtype, "width", compressed=compressed)
    if recipe.storage_dtype == QUANTISED:
        yield MatrixSpec(scales_path(f"sites/{site}"), n_groups(width), "float32", "group")


def _fields(path: str, dtype: str, columns: tuple[str, ...]) -> MatrixSpec:
    return MatrixSpec(path, len(columns), dtype, "field", columns, per_column_chunks=True)


def _attention(path: str, n_heads: int, k: int) -> list[MatrixSpec]:
    fields = _fields(f"{path}/values", "float32", ATTENTION_VALUES)
    return [
        MatrixSpec(f"{path}/weights", k, "float32", "k", n_heads=n_heads),
        MatrixSpec(f"{path}/offsets", k, "int32", "k", n_heads=n_heads),
        replace(fields, n_heads=n_heads),
    ]
