"""Memory that this process freed: kept for its next use, or returned to the system. Without torch: the image tools import it."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> bool:
    """Keep freed memory in this process from now on, instead of returning it to the system; False without glibc.

    glibc maps large tensors anew each time, and the system clears every page at its first touch: a fifth of the time of a LoRA's
    step. The peak hardly grows, since every step comes back to it.
    """
    library = _glibc()
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return library is not None and bool(library.mallopt(mmap_max, 0) and library.mallopt(trim_threshold, -1))


def give_back_freed_memory() -> None:
    """Return freed memory to the system, where the C library can: its arenas are per thread, so other threads cannot reuse it."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None  # musl has neither
