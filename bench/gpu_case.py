"""What a case of bench/gpu.py is, and what its builders share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import shapes

CACHE = 64 << 20  # bytes, where the device does not tell the size of its L2


@dataclass(frozen=True)
class Case:
    """One row. inputs: sets of equal arguments at different addresses, taken in turn."""

    ours: Callable
    rulers: dict[str, Callable]
    inputs: Sequence[tuple[Tensor, ...]]
    work: dict[str, float]
    difference: Callable[[object, object], float]
    limit: float


@dataclass(frozen=True)
class Size:
    """hidden and ff columns as in bench/shapes.py, tokens per call, device."""

    hidden: int
    ff: int
    tokens: int
    device: str


def size(quick: bool, device: str) -> Size:
    """Aya-8B's, or with `quick` a smoke test's."""
    layer = shapes.SMALL if quick else shapes.AYA_8B
    return Size(layer.hidden, layer.ff, 512 if quick else 8192, device)


def rotated(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Two to four copies of the arguments, so many that the L2 cache cannot hold them all."""
    cache = CACHE
    if tensors[0].is_cuda:
        properties = torch.cuda.get_device_properties(tensors[0].device)
        cache = getattr(properties, "L2_cache_size", CACHE)
    total = sum(t.nbytes for t in tensors)
    copies = min(4, max(2, 1 + math.ceil(2 * cache / max(1, total))))
    return [tensors] + [tuple(t.clone() for t in tensors) for _ in range(copies - 1)]


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


def disagreement(a: Tensor, b: Tensor) -> float:
    """Share of mask entries that differ."""
    return float((a != b).double().mean())
