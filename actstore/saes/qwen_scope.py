"""Qwen-Scope: `SAE-Res-MODEL-W{N}K-L0_{k}/layer{n}.sae.pt`, the k largest of x · W_enc + b_enc, then a ReLU."""

from __future__ import annotations

import re

from actstore.sites import Site

from .config import Config
from .declaration import Declaration, without_threshold

__all__ = ["declare"]

_REPOSITORY = re.compile(r"[^/]*-W(?P<width>\d+)K-L0_(?P<k>\d+)(?:/|$)")
_FILE = re.compile(r"(?:.*/)?layer(?P<layer>\d+)\.sae\.pt")
_FEATURES_PER_WIDTH = 1024


def declare(config: Config, path: str) -> Declaration:
    """Return what the path of a file says, all that there is: a path without the repository's name is a fault."""
    repository, file = _REPOSITORY.search(path), _FILE.fullmatch(path)
    k = int(repository["k"]) if repository else None
    if not k:
        config.faults.append(
            "how many features fire at once stands in its repository's name and nowhere else: keep the file in a "
            "folder of that name, such as SAE-Res-…-W32K-L0_50 for k = 50"
        )
    return Declaration(
        f"topk k={k}",
        {"w_enc": "w_enc", "b_enc": "b_enc", "w_dec": "w_dec", "b_dec": "b_dec"},
        "a dict of tensors W_enc (d_sae, d_in), W_dec (d_in, d_sae), b_enc, b_dec",
        turned=frozenset({"w_enc", "w_dec"}),
        sites=(Site("resid_post", int(file["layer"])),) if file else (),
        d_sae=int(repository["width"]) * _FEATURES_PER_WIDTH if repository else None,
        declared_l0=float(k) if k else None,
        k=k,
        fold=without_threshold,
    )
