"""Extraction: plan, corpus, the loop over shards, resume. Imports torch only when a model runs."""

from .encoding import encode, plan_encoding
from .plan import Plan, Size
from .planning import plan_extraction
from .request import EncodeRequest, Request
from .run import extract
from .work import Outcome

__all__ = [
    "EncodeRequest",
    "Outcome",
    "Plan",
    "Request",
    "Size",
    "encode",
    "extract",
    "plan_encoding",
    "plan_extraction",
]
