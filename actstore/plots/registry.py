"""Which query has which picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .attention import attention_between, attention_pattern, head_scores
from .features import activation_histogram, feature_expression, feature_ranges, token_expression
from .lens import lens_grid, lens_trajectory
from .sheet import Picture
from .words import concordance, token_strip

__all__ = ["PICTURES"]

PICTURES: Mapping[str, Callable[..., Picture]] = {
    "logit_lens": lens_grid,
    "lens_trajectory": lens_trajectory,
    "attention_pattern": attention_pattern,
    "attention_between": attention_between,
    "head_scores": head_scores,
    "activation_histogram": activation_histogram,
    "feature_stats": feature_ranges,
    "feature_expression": feature_expression,
    "token_expression": token_expression,
    "max_activating": concordance,
    "examples_by_interval": concordance,
    "feature_in_document": token_strip,
}
