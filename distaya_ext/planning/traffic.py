"""Bytes between the ranks of a run, counted from shapes alone: what every rank gives to others and
what comes to it. The counts are those of ranks/sums.py and ranks/reading.py, piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..ranks import Parts, Team, reading, sums


@dataclass(frozen=True)
class Traffic:
    """Bytes by rank. passed: given to single others (all_to_all); come: what arrives so; told:
    given to all others at once (broadcasts), counted once.
    """

    passed: tuple[int, ...]
    come: tuple[int, ...]
    told: tuple[int, ...]

    @staticmethod
    def none(world: int) -> Traffic:
        zeros = (0,) * world
        return Traffic(zeros, zeros, zeros)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            *(
                tuple(a + b for a, b in zip(mine, theirs, strict=True))
                for mine, theirs in zip(self._all, other._all, strict=True)
            )
        )

    def __mul__(self, times: int) -> Traffic:
        return Traffic(*(tuple(times * n for n in each) for each in self._all))

    @property
    def _all(self) -> tuple[tuple[int, ...], ...]:
        return self.passed, self.come, self.told

    @property
    def given(self) -> tuple[int, ...]:
        """As Team.sent counts."""
        return tuple(a + b for a, b in zip(self.passed, self.told, strict=True))

    @property
    def arrived(self) -> tuple[int, ...]:
        """Through the network into each rank."""
        whole = sum(self.told)
        return tuple(come + whole - own for come, own in zip(self.come, self.told, strict=True))

    def seconds(self, rate: float, copies: int = 1) -> float:
        """At `rate` bytes a second into and out of a rank. Broadcasts follow each other, each as
        slow as `copies` sent one after the other.
        """
        passed = max(*self.passed, *self.come)
        return (passed + (copies * sum(self.told) if len(self.told) > 1 else 0)) / rate


def summed(
    rows: int, columns: int, parts: Parts, *, upper: bool = False, itemsize: int = 4
) -> Traffic:
    """PartSums.finish() of one Sum [rows, columns], fp32 unless itemsize says otherwise."""
    world = len(parts.of_rank)
    if world == 1:
        return Traffic.none(1)
    kept = [kept_sums(own) for own in parts.of_rank]
    whole = sum(kept)
    passed, come, told = [0] * world, [0] * world, [0] * world
    for count in _pieces(rows, columns, upper=upper):
        widths = [s.stop - s.start for s in Team(0, world).shares(count)]
        for rank, width in enumerate(widths):
            passed[rank] += itemsize * kept[rank] * (count - width)
            come[rank] += itemsize * (whole - kept[rank]) * width
            told[rank] += itemsize * width
    return Traffic(tuple(passed), tuple(come), tuple(told))


def kept_sums(parts: range) -> int:
    """How many sums a rank with these parts passes on: the whole subtrees of sums.py's tree that
    they make up.
    """
    start, found = parts.start, 0
    while start < parts.stop:
        size = 1 << (parts.stop - start).bit_length() - 1
        start += size if start == 0 else min(size, start & -start)
        found += 1
    return found


def _pieces(rows: int, columns: int, *, upper: bool) -> Iterable[int]:
    """Elements of each piece that sums.py has under way."""
    if not upper:
        whole = rows * columns
        yield from (min(sums.PIECE, whole - start) for start in range(0, whole, sums.PIECE))
        return
    yield from ((stop - start) * (columns - start) for start, stop in sums.panels(rows))


def spread(rows: int, row_bytes: int, world: int, unit: int = 1) -> Traffic:
    """Rows of so many bytes each that all ranks have a share of, spread to all."""
    if world == 1:
        return Traffic.none(1)
    told = tuple(row_bytes * (s.stop - s.start) for s in Team(0, world).shares(rows, unit))
    return Traffic((0,) * world, (0,) * world, told)


def read_shared(shapes: Sequence[tuple[tuple[int, ...], int]], world: int) -> Traffic:
    """ranks.read_shared of tensors (shape, bytes of an element), in order. told is also what each
    rank reads from the disk.
    """
    if world == 1:
        return Traffic.none(1)
    total = Traffic.none(world)
    for number, (shape, itemsize) in enumerate(shapes):
        whole = math.prod(shape) * itemsize
        if whole <= reading.WHOLE or not shape:
            told = tuple(whole * (rank == number % world) for rank in range(world))
            total += Traffic((0,) * world, (0,) * world, told)
        else:
            total += spread(shape[0], whole // shape[0], world)
    return total
