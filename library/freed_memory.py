"""Freed memory: kept by the process for its next use, or returned to the system. Imports no torch, for the image tools."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> bool:
    """From now on keep freed memory in this process instead of returning it to the system. Returns False without glibc.

    By default glibc maps memory for each large tensor, and the system clears every page at first use: a fifth of the time of a
    LoRA's step. Peak memory hardly grows, since every step reaches it again.

    Threads that begin afterwards get no arenas of their own: most of what those had that read the model is used again by the one
    that trains.
    """
    library = _glibc()
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, M_MMAP_MAX and M_ARENA_MAX of malloc.h
    settings = {mmap_max: 0, trim_threshold: -1, arena_max: 1}
    return library is not None and all(library.mallopt(name, value) for name, value in settings.items())


def give_back_freed_memory() -> None:
    """Return freed memory to the system, with glibc only: threads do not find what lies in the arenas of others."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None  # musl has neither
