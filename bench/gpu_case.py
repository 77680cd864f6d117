"""What a case of bench/gpu.py is, and what its builders share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench import shapes

CACHE = 64 << 20  # bytes, where the device does not tell the size of its L2
STREAMED = 4  # times the L2 that pass before a copy is used again; evict-first loads outlive 2
MOST = 32  # copies


@dataclass(frozen=True)
class Case:
    """One row. inputs: sets of equal arguments at different addresses, taken in turn.

    graph: calls are so short that many are captured into one CUDA graph, which is timed. of: what
    the row is about, for the bars that compare rows.
    """

    ours: Callable
    rulers: dict[str, Callable]
    inputs: Sequence[tuple]
    work: dict[str, float]
    difference: Callable[[object, object], float]
    limit: float
    graph: bool = False
    of: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """hidden and ff columns as in bench/shapes.py, tokens per call, device."""

    hidden: int
    ff: int
    tokens: int
    device: str
    kv: int = 0

    @property
    def qkv(self) -> int:
        """Rows of [q|k|v]."""
        return self.hidden + 2 * (self.kv or self.hidden // 4)


def size(quick: bool, device: str) -> Size:
    """Aya-8B's, or with `quick` a smoke test's."""
    layer = shapes.SMALL if quick else shapes.AYA_8B
    return Size(layer.hidden, layer.ff, 512 if quick else 8192, device, layer.kv)


def cache_bytes(device: torch.device | str) -> int:
    """The L2 cache of a GPU; a guess elsewhere."""
    if torch.device(device).type != "cuda":
        return CACHE
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", CACHE)


def copies(nbytes: int, device: torch.device | str) -> int:
    """How many copies of `nbytes` it takes that each has left the cache when its turn comes."""
    return min(MOST, max(2, math.ceil(STREAMED * cache_bytes(device) / max(1, nbytes))))


def rotated(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Copies of the arguments, so many that the L2 cache cannot hold them all; at most four,
    because the clock empties the cache before such a call anyway."""
    number = min(4, copies(sum(t.nbytes for t in tensors), tensors[0].device))
    return [tensors] + [tuple(t.clone() for t in tensors) for _ in range(number - 1)]


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


def disagreement(a: Tensor, b: Tensor) -> float:
    """Share of mask entries that differ."""
    return float((a != b).double().mean())
