"""What storing sites in a narrower dtype than they are computed in loses: measured on the first plain rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from actstore.health import HealthCheck
from actstore.quantised import dequantise, quantise
from actstore.recipe import QUANTISED, Recipe
from actstore.sites import parse_site
from actstore.tensors import as_array, as_tensor

from .proof import PlainRows

if TYPE_CHECKING:
    import torch

__all__ = ["rounding_checks"]

NAME = "site_rounding"
MOST_ERROR = 0.05
SITES_AT_ONCE = 8  # whose rows are on the device together


def rounding_checks(source: PlainRows, recipe: Recipe) -> Iterator[HealthCheck]:
    """Yield for each site of a recipe that is stored with rounding the relative error, √(Σ‖x − x̂‖² ÷ Σ‖x‖²).

    Beside it stands how many values became 0: of channels whose neighbours are far larger, which the error hides.
    """
    if recipe.storage_dtype in ("float32", recipe.compute_dtype):
        return
    for first in range(0, len(recipe.sites), SITES_AT_ONCE):
        sites = [parse_site(name) for name in recipe.sites[first : first + SITES_AT_ONCE]]
        rows = source.at(set(sites))
        yield from (_check(str(site), rows[site].float(), recipe.storage_dtype) for site in sites)


def _check(site: str, exact: torch.Tensor, dtype: str) -> HealthCheck:
    stored = _rounded(exact, dtype)
    error = float((stored - exact).norm() / exact.norm())
    lost = float(((stored == 0) & (exact != 0)).float().mean())
    expected = f"at most {MOST_ERROR}: {dtype} on {len(exact)} plain rows; {lost:.2%} of the values became 0"
    return HealthCheck(NAME, site, error, expected, error <= MOST_ERROR if len(exact) else None)


def _rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return what is read back of values that are stored in a dtype: float32 (row, width)."""
    import torch

    if dtype != QUANTISED:
        return values.to(getattr(torch, dtype)).float()
    small, scales = quantise(values)
    return as_tensor(dequantise(as_array(small), as_array(scales))).to(values.device)
