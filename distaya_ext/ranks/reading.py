"""Weights from one shared folder: every rank reads its share of each tensor and has the others'
from them, so that all together read each byte once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .team import Team, team

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

WHOLE = 1 << 16  # bytes; a tensor up to this size is read by one rank


def read_shared(
    checkpoint: Checkpoint, names: Iterable[str], by: Team | None = None
) -> dict[str, Tensor]:
    """Checkpoint.read on the CPU, by all ranks together; to be called by all of them.

    Raises what Checkpoint.read raises, on the rank that has read the part it is about.
    """
    by, names = by or team(), list(names)
    if by.alone:
        return checkpoint.read(names)
    found: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        entry = checkpoint.entries[name]
        whole = torch.empty(tuple(entry.shape), dtype=entry.dtype)
        if entry.nbytes <= WHOLE or not entry.shape:
            owner = number % by.world
            if by.rank == owner:
                whole.copy_(checkpoint.read([name])[name])
                by.read += entry.nbytes
            by.broadcast_(whole, owner, by.reading)
        else:
            shares = by.shares(len(whole))
            mine = shares[by.rank]
            if mine.stop > mine.start:
                whole[mine] = checkpoint.read_rows(name, mine)
                by.read += whole[mine].nbytes
            by.spread_(whole, shares, by.reading)
        found[name] = whole
    return found
