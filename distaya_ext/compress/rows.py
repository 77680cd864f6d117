"""Rows of a stack of matrices, dealt out to the processes of a run: a sweep treats each alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..ops.among import Among
from ..ranks import Team, team

UNIT = 16  # rows that stay together, so that kernels work on whole tiles


class Rows:
    """`count` rows; own: those of this process."""

    def __init__(self, count: int, by: Team | None = None):
        self.count, self.team = count, by or team()
        self.shares = self.team.shares(count, UNIT)
        self.own = self.shares[self.team.rank]

    @property
    def shared(self) -> bool:
        """Whether other processes have rows, too."""
        return not self.team.alone

    @property
    def among(self) -> Among | None:
        """For what chooses among all rows; None: they are all here."""
        if not self.shared:
            return None
        counts = tuple(share.stop - share.start for share in self.shares)
        return Among(self.team.rank, counts, self.team.all_gather, self._deal)

    def _deal(self, makers: Sequence[Callable[[], Tensor]], like: Tensor) -> Iterator[Tensor]:
        """As many at once as there are processes, each makes another one; whoever has made one
        passes it on when it is wanted. Each holds its own and the one in use.
        """
        us = self.team
        for first in range(0, len(makers), us.world):
            turn = makers[first : first + us.world]
            own = turn[us.rank]() if us.rank < len(turn) else None
            for source in range(len(turn)):
                made = own if source == us.rank else torch.empty_like(like)
                yield us.broadcast_(made, source)

    def part(self, tensor: Tensor) -> Tensor:
        """This process's rows of a tensor [count, ...]."""
        return tensor[self.own] if self.shared else tensor

    def stacked(self, matrices: Sequence[Tensor]) -> Tensor:
        """This process's rows of a stack of matrices."""
        if not self.shared:
            return torch.cat(list(matrices))
        parts, row = [], 0
        for W in matrices:
            first, last = max(self.own.start - row, 0), max(self.own.stop - row, 0)
            parts.append(W[first:last])
            row += len(W)
        return torch.cat(parts)

    def whole(self, part: Tensor | None) -> Tensor | None:
        """[count, ...] on every process, from each one's rows."""
        if part is None or not self.shared:
            return part
        return self.team.collect(part.contiguous(), self.count, self.shares)
