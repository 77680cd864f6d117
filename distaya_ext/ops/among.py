"""Rows of one matrix that lie on several ranks: what a kernel needs that must choose among all.

Kernels treat rows independently but where so many weights of a whole matrix are to go. There every
rank counts its own, and tables of counts are exchanged: the result is exactly that of one process
with all rows, for every way of dealing them out (csrc/core/among.h).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distaya_ext import _C
from distaya_ext.errors import InputError


class Among(NamedTuple):
    """Where the rows that a rank hands to an op stand among those of all ranks.

    rank      which of the ranks this is
    rows      how many rows each rank has, in the order of the ranks; together they are the matrix.
              0 is allowed: such a rank passes [0, cols] and takes part in the exchanges
    exchange  int64 [n] of every rank -> int64 [world, n] on every rank and on the same device, such
              as ``Team.all_gather``; the tensor it is given is written again afterwards. Every rank
              calls the op, with the same options, and the op calls it equally often on all of them
    """

    rank: int
    rows: tuple[int, ...]
    exchange: Callable[[Tensor], Tensor]

    @property
    def total(self) -> int:
        """Rows of the whole matrix."""
        return sum(self.rows)

    def check(self, rows: int) -> None:
        """Raise InputError unless this rank has so many rows."""
        if not 0 <= self.rank < len(self.rows):
            raise InputError(f"rank {self.rank} is none of the {len(self.rows)} ranks of among")
        if rows != self.rows[self.rank]:
            raise InputError(
                f"rank {self.rank} was given {rows} rows but has {self.rows[self.rank]} of among"
            )

    def tables(self, most: int, device: torch.device) -> tuple[Any, Tensor]:
        """What a door takes for tables of at most so many counts: (its options, the tables)."""
        world = len(self.rows)
        tables = torch.zeros(world + 1, most, dtype=torch.int64, device=device)
        own, found = tables[0], tables[1:].view(-1)

        def exchange(n: int) -> None:
            theirs = self.exchange(own[:n])
            if theirs.shape != (world, n):
                raise InputError(
                    f"exchange of int64 [{n}] among {world} ranks gave {list(theirs.shape)}"
                )
            if theirs.device.type == "cpu" and not torch.equal(theirs[self.rank], own[:n]):
                raise InputError(f"exchange gave rank {self.rank} other counts than its own {n}")
            found[: world * n].view(world, n).copy_(theirs)

        first = sum(self.rows[: self.rank])
        return _C.AmongOptions(self.rank, world, first, self.total, exchange), tables
