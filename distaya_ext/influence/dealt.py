"""A walk's windows, dealt out to the ranks of a run: whole chunks, the same as in one process, so
that every score has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from ..compress.calibrate import Calibration
from ..ranks import team


class Dealt:
    """Chunks of neighbouring windows for each rank, rank 0 the first ones; where there are fewer
    chunks than ranks, the last ranks have none and only read weights with the others.

    own: this rank's chunks, int64 [windows, length] each; begins: whether its first one is the
    first of all
    """

    def __init__(self, windows: Calibration):
        self.team = team()
        chunks = windows.ids.split(windows.windows_per_chunk)
        sizes = [s.stop - s.start for s in reversed(self.team.shares(len(chunks)))]
        of_rank = [slice(a, b) for a, b in pairwise([0, *accumulate(sizes)])]
        ends = [0, *accumulate(map(len, chunks))]
        self.shares = [slice(ends[s.start], ends[s.stop]) for s in of_rank]
        self.count = len(windows.ids)
        mine = of_rank[self.team.rank]
        self.own, self.begins = chunks[mine], mine.start == 0

    def gather(self, tables: list[np.ndarray]) -> list[np.ndarray]:
        """Float64 tables [own windows, columns] become [windows, columns], on every rank, which
        must all have as many tables of the same columns.
        """
        if self.team.alone or not tables:
            return tables
        own = torch.from_numpy(np.concatenate(tables, axis=1))
        whole = self.team.collect(own, self.count, self.shares).numpy()
        return np.split(whole, np.cumsum([table.shape[1] for table in tables])[:-1], axis=1)

    def only_first(self, tell: Callable[[Any], None]) -> Callable[[Any], None]:
        """Progress is that of rank 0, whose share is as large as any."""
        return tell if self.team.first else lambda event: None
