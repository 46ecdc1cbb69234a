"""Identity of weights. One rule per source, named inside the digest, so that digests of two rules never agree."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from actstore.sealed import digest_of, sha256_hex, sha256_of_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["digest_of_files", "digest_of_tensors"]


def digest_of_files(files: Iterable[Path]) -> str:
    """Return the identity of weights on disk: SHA-256 of ["safetensors-files-1", sorted SHA-256 of each file]."""
    return digest_of(["safetensors-files-1", sorted(map(sha256_of_file, files))])


def digest_of_tensors(model: PreTrainedModel) -> str:
    """Return the identity of weights in memory: SHA-256 of ["tensors-1", sorted [name, dtype, shape, SHA-256]].

    Over the state dict, tied tensors under each of their names; bytes row-major, little-endian.
    """
    import torch

    tensors = [
        [
            name,
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            sha256_hex(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data),
        ]
        for name, tensor in sorted(model.state_dict().items())
    ]
    return digest_of(["tensors-1", tensors])
