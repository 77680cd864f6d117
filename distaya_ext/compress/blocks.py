"""Freed memory goes back to the system, so that a peak is what was in use and not what was kept."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

from ..checkpoint import Checkpoint

# glibc's parameter M_MMAP_THRESHOLD: blocks from this size on are mapped, each by itself, and
# unmapped when they are freed. Left alone glibc raises it up to 32 MiB as blocks are freed, keeps
# them in its heap, and what lives long there keeps holes open, others in every run. Mapping anew
# costs time, the more the smaller the blocks: these two keep bench/plan.py within a few per cent of
# the peak at a small part of the time.
_M_MMAP_THRESHOLD = -3
_USUAL, _CAREFUL = 16 << 20, 8 << 20
_LARGE = 8 << 20  # bytes of a matrix in fp32: where none is as large, blocks of 16 MiB are rare


class _Way:
    """Of this process: whether freed memory goes back."""

    frugal = False


def threshold(checkpoint: Checkpoint, *, careful: bool) -> int | None:
    """The least size of a block that goes back as soon as it is freed; None without glibc.

    careful: the memory is limited, or layers are trained, which makes many blocks of middling size.
    """
    if _library() is None:
        return None
    entries = checkpoint.entries
    largest = max(math.prod(entries[f"{name}.weight"].shape) for name in checkpoint.linears())
    return _CAREFUL if careful or 4 * largest < _LARGE else _USUAL


def give_back(checkpoint: Checkpoint, *, careful: bool) -> None:
    """From now on this process keeps no freed block of threshold() bytes or more."""
    size = threshold(checkpoint, careful=careful)
    if size is not None and _library().mallopt(_M_MMAP_THRESHOLD, size):
        _Way.frugal = True


def trim() -> None:
    """Give back the holes between smaller blocks, too; between stages, where others will be
    wanted. Nothing happens where give_back() did nothing.
    """
    if _Way.frugal:
        _library().malloc_trim(0)


@functools.cache
def _library() -> Any:
    """The C library where it is glibc, else None."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
