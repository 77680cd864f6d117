"""Which of a teacher's layers its student keeps, when only their number is said."""

from __future__ import annotations

import math
from typing import Any

from ..checkpoint import Checkpoint
from ..compress.calibrate import Calibration
from ..errors import UsageError
from ..influence.choose import choose
from ..influence.spec import SCORES, DropSpec

LAYERS_BY = (*SCORES, "spread")


def how_layers(layers_by: str | None, chosen: bool, texts: Any) -> tuple[str, bool]:
    """How layers are chosen, and whether that takes texts; "" where they are not chosen."""
    if layers_by not in (None, *LAYERS_BY):
        raise UsageError(f"layers_by {layers_by!r} is none of {', '.join(LAYERS_BY)}")
    if not chosen:
        return "", False
    how = layers_by or ("spread" if texts is None else DropSpec(count=1).score)
    return how, how != "spread"


def choose_layers(
    checkpoint: Checkpoint, left: int, by: str, calibration: Calibration | None, device: str
) -> list[int]:
    """The numbers of the `left` layers that stay."""
    count = checkpoint.config.num_hidden_layers
    if by == "spread":
        return spread(count, left)
    spec = DropSpec(count=count - left, score=by)
    dropped = choose(checkpoint, calibration, spec, device=device).dropped
    return [index for index in range(count) if index not in dropped]


def spread(count: int, left: int) -> list[int]:
    """`left` of `count` layers, evenly spread, the first and the last among them (1: the first)."""
    return sorted({math.floor(i * (count - 1) / max(1, left - 1) + 0.5) for i in range(left)})
