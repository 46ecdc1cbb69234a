"""What a recipe makes: the declarations of its arrays, from widths alone."""

from __future__ import annotations

from collections.abc import Callable

from actstore.blocks import (
    LENS_IDS,
    LENS_VALUES,
    PREDICTION_IDS,
    PREDICTION_VALUES,
    RECONSTRUCTION_VALUES,
    FiringsSpec,
    MatrixSpec,
)
from actstore.recipe import Recipe
from actstore.sites import Site, parse_site

__all__ = ["firings_of", "matrices_of"]


def matrices_of(recipe: Recipe, site_width: Callable[[Site], int]) -> tuple[MatrixSpec, ...]:
    """Return the matrices that a pass with this recipe writes."""
    specs = [
        MatrixSpec(f"sites/{name}", site_width(parse_site(name)), recipe.storage_dtype, "width")
        for name in recipe.sites
    ]
    specs += [_fields(f"reconstruction/{coder.sae}", "float32", RECONSTRUCTION_VALUES) for coder in recipe.saes]
    if recipe.predictions:
        specs.append(_fields("predictions/values", "float32", PREDICTION_VALUES))
        specs.append(_fields("predictions/ids", "int32", PREDICTION_IDS))
    for name in recipe.lens_sites:
        logprobs = tuple(f"logprob_{rank}" for rank in range(1, recipe.lens_k + 1))
        tokens = tuple(f"token_id_{rank}" for rank in range(1, recipe.lens_k + 1))
        specs.append(_fields(f"lens/logit/{name}/values", "float32", (*LENS_VALUES, *logprobs)))
        specs.append(_fields(f"lens/logit/{name}/ids", "int32", (*LENS_IDS, *tokens)))
    return tuple(specs)


def firings_of(recipe: Recipe) -> tuple[FiringsSpec, ...]:
    """Return the firings that a pass with this recipe writes."""
    return tuple(FiringsSpec(coder.sae, coder.width) for coder in recipe.saes)


def _fields(path: str, dtype: str, columns: tuple[str, ...]) -> MatrixSpec:
    return MatrixSpec(path, len(columns), dtype, "field", columns, per_column_chunks=True)
