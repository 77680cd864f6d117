"""Freed memory goes back to the system, so that a peak is what was in use and not what was kept."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

# glibc's parameter M_MMAP_THRESHOLD: blocks from this size on are mapped, each by itself, and
# unmapped when they are freed. Left alone glibc raises it up to 32 MiB as blocks are freed, keeps
# them in its heap, and what lives long there keeps holes open: measured on layers of width 1024
# that was 120 to 250 MiB of 1000, another number in every run. Mapping anew costs time: at width
# 2048 2 % with 8 MiB, where that leaves 130 MiB of holes at width 1024; at width 256 15 % with
# 4 MiB and 40 % with 2 MiB.
_M_MMAP_THRESHOLD = -3
THRESHOLD = 4 << 20


def give_back() -> bool:
    """From now on this process keeps no freed block of THRESHOLD bytes or more. False where the C
    library is not glibc and nothing changed.
    """
    return _library() is not None and bool(_library().mallopt(_M_MMAP_THRESHOLD, THRESHOLD))


def trim() -> None:
    """Give back the holes between smaller blocks; between stages, where others will be wanted."""
    if _library() is not None:
        _library().malloc_trim(0)


@functools.cache
def _library() -> Any:
    """The C library where it is glibc, else None."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
