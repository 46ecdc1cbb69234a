"""The process' memory: what the C library does with freed blocks, and how much there ever was."""

from __future__ import annotations

import ctypes
import resource
import sys
from functools import cache

__all__ = ["keep_freed_memory", "peak_memory_bytes"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
LARGEST_BLOCK = 1 << 30
N_ARENAS = 1  # every other arena keeps freed blocks of its own, and they are large: threads meet in few calls


@cache
def keep_freed_memory() -> bool:
    """Keep large blocks that are freed for the next ones like them; return whether the C library can be told so.

    glibc gives every freed block above 32 MB back to the kernel, which clears each of its pages again when the next
    activation of the same size is allocated, which a forward pass on the CPU does in every layer. The most that the
    process ever used at once is what it keeps then: once, and not in every thread, where this is called before
    there are threads.
    """
    if not sys.platform.startswith("linux"):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:  # musl
        return False
    options = ((M_MMAP_THRESHOLD, LARGEST_BLOCK), (M_TRIM_THRESHOLD, LARGEST_BLOCK), (M_ARENA_MAX, N_ARENAS))
    return all(bool(set_option(*option)) for option in options)


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
