"""Shapes that fit a budget, derived from a teacher: each as large as the budget allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..checkpoint import Checkpoint
from .layers import spread
from .narrow import cut_size
from .shape import Shape, own_shape

_STEP = 64  # widths come in multiples of it where they are large enough
_FRACTIONS = 32  # widths tried
_LEAST = 8  # a width is cut to an eighth at most


def derive(checkpoint: Checkpoint, budget: int) -> dict[str, Shape]:
    """By what is cut: depth, mlp, width, depth+mlp, depth+width; those that fit, each once.

    With depth and something else a quarter of the layers goes. Nothing when the teacher fits.
    """
    own = own_shape(checkpoint)
    if parameters(checkpoint, own) <= budget:
        return {}
    count, fewer = len(own.layers), _fewer(own)

    def largest(shapes: Iterable[Shape]) -> Shape | None:
        return next((s for s in shapes if parameters(checkpoint, s) <= budget), None)

    tried: dict[str, Callable[[], Shape | None]] = {
        "depth": lambda: largest(
            replace(own, layers=tuple(spread(count, left))) for left in range(count - 1, 0, -1)
        ),
        "mlp": lambda: largest(_mlps(own)),
        "width": lambda: largest(_widths(own)),
        "depth+mlp": lambda: largest(_mlps(fewer)),
        "depth+width": lambda: largest(_widths(fewer)),
    }
    found: dict[str, Shape] = {}
    for name, find in tried.items():
        shape = find()
        if shape is not None and shape not in found.values() and shape != own:
            found[name] = shape
    return found


def smallest(checkpoint: Checkpoint) -> int:
    """Parameters of the smallest shape that derive() tries."""
    own = own_shape(checkpoint)
    fewer = _fewer(own)
    ends = [replace(own, layers=own.layers[:1]), *_mlps(fewer), *_widths(fewer)]
    return min(parameters(checkpoint, shape) for shape in ends)


def parameters(checkpoint: Checkpoint, shape: Shape) -> int:
    """Parameters of a student of this shape, from the shapes of the teacher's tensors."""
    start, head = f"{checkpoint.architecture.layers}.", f"{checkpoint.architecture.head}.weight"
    total = 0
    for name, entry in checkpoint.entries.items():
        if name == head and checkpoint.tied:
            continue
        times = 1
        if name.startswith(start):
            if not name.startswith(f"{start}0."):
                continue  # layers are alike
            times = len(shape.layers)
        total += times * math.prod(cut_size(name, entry.shape, shape, checkpoint.architecture))
    return total


def _fewer(own: Shape) -> Shape:
    count = len(own.layers)
    return replace(own, layers=tuple(spread(count, max(1, round(0.75 * count)))))


def _mlps(own: Shape) -> Iterable[Shape]:
    step = _step(own.intermediate)
    for size in range((own.intermediate - 1) // step * step, own.intermediate // _LEAST - 1, -step):
        if size:
            yield replace(own, intermediate=size)


def _widths(own: Shape) -> Iterable[Shape]:
    """Hidden size, MLP and heads by the same share, the hidden size a multiple of the heads."""
    group = own.heads // own.kv_heads
    for part in range(_FRACTIONS - 1, _FRACTIONS // _LEAST - 1, -1):
        share = part / _FRACTIONS
        kv_heads = max(1, math.floor(own.kv_heads * share))
        heads = kv_heads * group
        step = math.lcm(heads, 8)
        hidden = math.floor(own.hidden * share) // step * step
        mlp = _step(own.intermediate)
        intermediate = math.floor(own.intermediate * share) // mlp * mlp
        if hidden and intermediate:
            yield replace(
                own, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads
            )


def _step(size: int) -> int:
    return _STEP if size >= 16 * _STEP else 8
