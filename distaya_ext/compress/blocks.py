"""Freed memory goes back to the system, so that a peak is what was in use and not what was kept."""

from __future__ import annotations

import ctypes
import functools

# glibc's parameter M_MMAP_THRESHOLD: blocks from this size on are mapped, each by itself, and
# unmapped when they are freed. Left alone glibc raises it up to 32 MiB as blocks are freed, keeps
# them in its heap, and what lives long there keeps holes open: measured on a layer of width 1024
# that was 120 to 250 MiB of 1000, another number in every run. Smaller blocks stay in the heap,
# since mapping them anew costs more than it saves (4 % of the time at width 2048 with 8 MiB, half
# of it at width 256 with 1 MiB).
_M_MMAP_THRESHOLD = -3
THRESHOLD = 8 << 20


@functools.cache
def give_back() -> bool:
    """From now on this process keeps no freed block of THRESHOLD bytes or more. False where the C
    library is not glibc and nothing changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, THRESHOLD))
