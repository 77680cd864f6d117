"""Which rank of a run factorises and measures what: the same answer on every rank, from numbers
that all of them have.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..ranks import team
from ..ranks.sums import panels


@dataclass(frozen=True)
class Dealt:
    """Measurements of `variants` models on `count` windows each, `chunk` windows at a time.

    A measurement of one chunk is what is dealt out, and stays whole: windows that are run together
    decide the bits. All measurements stand in a row, variant by variant, and every rank has a piece
    of that row, of equally many windows but for one chunk; a variant at the end of a piece is
    measured by two ranks (or more), each on chunks of its own.
    """

    variants: int
    count: int
    chunk: int
    world: int = 1

    @cached_property
    def edges(self) -> list[int]:
        """[world + 1] places in the row of variants * count windows."""
        total = self.variants * self.count
        found = []
        for rank in range(self.world):
            variant, window = divmod(total * rank // self.world, self.count)
            found.append(variant * self.count + window // self.chunk * self.chunk)
        return [*found, total]

    def rank_of(self, variant: int, chunk: int = 0) -> int:
        """Who measures that."""
        place = variant * self.count + chunk * self.chunk
        return bisect_right(self.edges, place) - 1

    def of_rank(self, rank: int, chunk: int) -> list[int]:
        """The variants that this rank measures on a chunk."""
        return [i for i in range(self.variants) if self.rank_of(i, chunk) == rank]

    def needs(self, rank: int) -> list[int]:
        """The variants that this rank measures on some chunk."""
        start, stop = self.edges[rank], self.edges[rank + 1]
        return list(range(start // self.count, -(-stop // self.count))) if stop > start else []

    def gathered(self, own: np.ndarray) -> np.ndarray:
        """float64 [variants, count] out of what every rank has at its own places."""
        us, table = team(), torch.from_numpy(own).view(-1)
        us.spread_(table, [slice(a, b) for a, b in zip(self.edges, self.edges[1:], strict=False)])
        return own


def broadcast_upper(square: torch.Tensor, source: int) -> None:
    """The upper triangle of rank `source`'s [n, n], in place on every rank, in panels of rows."""
    us = team()
    for start, stop in () if us.alone else panels(len(square)):
        panel = square[start:stop, start:].contiguous()
        square[start:stop, start:] = us.broadcast_(panel, source)
