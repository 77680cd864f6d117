"""The processes of one run, as one of them sees them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import LostError, one_line

_LOOK = timedelta(seconds=0.5)  # how long a collective is waited for before a look around


@dataclass
class Team:
    """world processes, of which this is number `rank`; local_*: the same among those of this host.

    sent: bytes of tensors that this process has given to others; read: bytes of checkpoints that it
    has read itself; waited: seconds in which it waited for others or for the wire; begun:
    collectives; left_behind: those that nobody waits for any more, whose group must not be taken
    down. All methods that pass something on are to be called by every rank, in the same order.
    LostError when another rank has ended or does not answer in time.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    reading: Any = None  # a group of its own: another thread may read while this one sums
    watch: Any = None  # tells who was lost; see watch.Watch
    sent: int = 0
    read: int = 0
    waited: float = 0.0
    begun: int = 0
    left_behind: list[Any] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)  # of joining, for the user

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    # ---- who does what ----

    def shares(self, count: int, unit: int = 1) -> list[slice]:
        """`count` things in a row, dealt out: one slice per rank, in order, whole units each but
        for the last; sizes differ by one unit at most, and are 0 where there is too little.
        """
        units = -(-count // unit)
        ends = [min(count, unit * (units * (r + 1) // self.world)) for r in range(self.world)]
        return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def share(self, count: int, unit: int = 1) -> slice:
        """Of these, this rank's own."""
        return self.shares(count, unit)[self.rank]

    # ---- plain values ----

    def tell(self, value: Any = None) -> Any:
        """A plain value (as JSON has them) of rank 0, on every rank."""
        return self.gather(value if self.first else None)[0]

    def gather(self, value: Any) -> list[Any]:
        """The plain values of all ranks, in order, on every rank."""
        if self.alone:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        self._together(dist.all_gather, sizes, torch.tensor([len(own)]))
        found = [torch.empty(int(size), dtype=torch.uint8) for size in sizes]
        found[self.rank].copy_(own)
        for rank, part in enumerate(found):
            self.broadcast_(part, rank)
        return [json.loads(bytes(part.numpy())) for part in found]

    def wait(self) -> None:
        """Until every rank is here."""
        self.gather(None)

    # ---- tensors ----

    def broadcast_(self, tensor: Tensor, source: int = 0, group: Any = None) -> Tensor:
        """The contiguous tensor of rank `source`, in place on every rank."""
        if not self.alone and tensor.numel():
            if self.rank == source:
                self.sent += tensor.nbytes
            # As bytes: no backend has all dtypes.
            plain = tensor.view(-1).view(torch.uint8)
            self._together(dist.broadcast, plain, source, group=group)
        return tensor

    def from_first(self, tensor: Tensor | None) -> Tensor:
        """The tensor of rank 0 on every rank, on the CPU; the others need not know its shape."""
        if self.alone:
            return tensor
        about = self.tell([list(tensor.shape), str(tensor.dtype)[6:]] if self.first else None)
        if not self.first:
            tensor = torch.empty(about[0], dtype=getattr(torch, about[1]))
        return self.broadcast_(tensor)

    def spread_(self, tensor: Tensor, shares: list[slice], group: Any = None) -> Tensor:
        """Rows shares[r] of the contiguous tensor, which rank r has, in place on every rank."""
        for rank, rows in enumerate(shares):
            self.broadcast_(tensor[rows], rank, group)
        return tensor

    def collect(self, part: Tensor, count: int, shares: list[slice]) -> Tensor:
        """[count, ...] out of the rows [share, ...] of every rank, on every rank."""
        if self.alone:
            return part
        whole = part.new_empty(count, *part.shape[1:])
        whole[shares[self.rank]] = part
        return self.spread_(whole, shares)

    def exchange(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """parts[r], flat and of one dtype, goes to rank r; what came from each rank, of sizes[r]
        elements.
        """
        if self.alone:
            return parts
        given = torch.cat(parts)
        come = given.new_empty(sum(sizes))
        self.sent += given.nbytes - parts[self.rank].nbytes
        lengths = [len(part) for part in parts]
        self._together(dist.all_to_all_single, come, given, sizes, lengths)
        return list(come.split(sizes))

    def all_gather(self, row: Tensor) -> Tensor:
        """[world, n] out of the small row [n] of every rank, on every rank and on row's device."""
        if self.alone:
            return row[None]
        rows = [torch.empty_like(row) for _ in range(self.world)]
        self.sent += row.nbytes
        self._together(dist.all_gather, rows, row)
        return torch.stack(rows)

    def _together(self, begin: Callable[..., Any], *args: Any, **named: Any) -> None:
        """Begin a collective and wait for it. What the backend says of another rank's end becomes
        a sentence.
        """
        if self.watch is not None:
            self.watch.check()
        since = time.perf_counter()
        self.begun += 1
        try:
            self._over(begin(*args, async_op=True, **named), args)
        except RuntimeError as error:
            if self.watch is not None:
                raise self.watch.lost(error) from None
            raise LostError(f"another rank does not answer: {one_line(error)}") from None
        finally:
            self.waited += time.perf_counter() - since

    def _over(self, work: Any, args: tuple[Any, ...]) -> None:
        """Wait such that signals and news of other ranks get through. On a GPU only its stream
        waits.
        """
        if self.watch is None or any(isinstance(t, Tensor) and t.is_cuda for t in args):
            work.wait()
            return
        try:
            while not work.is_completed():
                with contextlib.suppress(RuntimeError):  # not yet; what went wrong is raised below
                    work.wait(_LOOK)
                self.watch.check()
        except BaseException:
            if not work.is_completed():
                self.left_behind.append((work, args))
            raise
        work.wait()


_alone = Team()
_current: list[Team] = []


def team() -> Team:
    """The team of this process; without torchrun a team of one."""
    return _current[-1] if _current else _alone


@contextmanager
def acting(as_team: Team) -> Iterator[Team]:
    """Inside, team() is this one."""
    _current.append(as_team)
    try:
        yield as_team
    finally:
        _current.pop()
