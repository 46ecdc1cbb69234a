"""What the device of a shard's numbers says of itself, and how a lack of its memory is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actstore.errors import InvalidInput, explain

if TYPE_CHECKING:
    import torch

__all__ = ["is_out_of_memory", "provenance", "too_large"]


def provenance(device: torch.device, *, compute_dtype: str, tile_rows: int) -> dict[str, Any]:
    """Return what a receipt says of how a shard was computed, whatever computed it."""
    import torch

    return {
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "compute_dtype": compute_dtype,
        "tf32": False,
        "threads": torch.get_num_threads(),  # of the CPU: sums are split among them
        "tile_rows": tile_rows,
        "versions": {"torch": torch.__version__},
    }


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of torch is a lack of memory: CUDA has a class for it, the CPU's allocator a sentence."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in str(error)


def too_large(what: str, error: RuntimeError, next_step: str) -> InvalidInput:
    """Return the error for what does not fit the memory."""
    return InvalidInput(explain(f"{what} the memory ({str(error).splitlines()[0]})", next_step=next_step))
