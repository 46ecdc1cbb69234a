"""Extraction: plan, corpus, the loop over shards, resume. Imports torch only when a model runs."""

from .plan import Plan, Size
from .planning import plan_extraction
from .request import Request
from .run import Outcome, extract

__all__ = ["Outcome", "Plan", "Request", "Size", "extract", "plan_extraction"]
