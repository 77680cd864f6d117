"""Sums over calibration windows in an order that the number of parts alone decides.

The windows are cut into P parts of neighbouring windows. Each part is summed from zero, window by
window; the parts are then added as a binary tree over their numbers,

    S(a, b) = S(a, m) + S(m, b),  m = a + the largest power of two below b - a

so the result has the same bits however the parts are dealt out to processes: to one for all, to two
with P / 2 each, or to P. A process that has several parts keeps as many sums as the tree asks of
it, about log2 of their number.

Between processes every element is sent once to the one that adds it and once back (reduce-scatter,
then all-gather), in pieces of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .team import Team, team

PIECE = 1 << 24  # elements that are under way at once
_LEAST, _PANELS = 1 << 20, 16  # elements, and panels, that a triangle is worth cutting into


@dataclass(frozen=True)
class Sum:
    """A tensor that a part's windows were added to, contiguous, fp32 or fp64. upper: [C, C], of
    which only the upper triangle counts.
    """

    tensor: Tensor
    upper: bool = False


@dataclass(frozen=True)
class Parts:
    """How many parts there are, and those of every rank: ranges, in order, without gaps."""

    count: int = 1
    of_rank: tuple[range, ...] = (range(1),)
    rank: int = 0

    @staticmethod
    def dealt(count: int, to: Team | None = None) -> Parts:
        """So many parts among the ranks of the team, as evenly as it goes."""
        to = to or team()
        shares = to.shares(count)
        return Parts(count, tuple(range(s.start, s.stop) for s in shares), to.rank)

    @property
    def own(self) -> range:
        return self.of_rank[self.rank]


@dataclass
class _Block:
    """The sum of parts [start, start + size), one tensor per Sum."""

    start: int
    size: int
    tensors: list[Tensor] = field(default_factory=list)


class PartSums:
    """Use: add windows of a part to the tensors, close(); ...; after this rank's last part (or with
    none at all) finish(): every tensor then holds the sum over all parts of all ranks.
    """

    def __init__(self, parts: Parts, sums: Sequence[Sum], by: Team | None = None):
        self.parts, self.sums, self.team = parts, list(sums), by or team()
        self._blocks: list[_Block] = []
        self._closed = 0

    def close(self) -> None:
        """The part at work is whole."""
        part = self.parts.own[self._closed]
        self._closed += 1
        live = [s.tensor for s in self.sums]
        if self._closed == len(self.parts.own):
            tensors = live  # in their place
        else:
            tensors = [t.clone() for t in live]
            for t in live:
                t.zero_()
        _push(self._blocks, _Block(part, 1, tensors))

    def finish(self) -> None:
        """LostError when a rank was lost."""
        if self._closed != len(self.parts.own):
            raise AssertionError(f"{self._closed} of {len(self.parts.own)} parts were closed")
        if self.team.alone:
            self._settle(_folded(self._blocks).tensors)
            return
        own = [block.tensors for block in self._blocks]
        for index, one in enumerate(self.sums):
            blocks = [tensors[index] for tensors in own]
            for pieces, back in _pieces(one, blocks):
                _put(back, self._over_ranks(pieces, back[0]))
        self._blocks.clear()

    def _settle(self, tensors: list[Tensor]) -> None:
        for one, tensor in zip(self.sums, tensors, strict=True):
            if one.tensor is not tensor:
                one.tensor.copy_(tensor)

    def _over_ranks(self, pieces: list[Tensor], like: Tensor) -> Tensor:
        """The sum of a piece, flat, over the blocks of all ranks. pieces: of this rank's blocks."""
        count = like.numel()
        shares = self.team.shares(count)
        flat = [piece.reshape(-1) for piece in pieces]
        nothing = like.new_empty(0)
        parts = [torch.cat([nothing, *(piece[s] for piece in flat)]) for s in shares]
        mine = shares[self.team.rank]
        width = mine.stop - mine.start
        structure = [_blocks_of(parts) for parts in self.parts.of_rank]
        come = self.team.exchange(parts, [width * len(blocks) for blocks in structure])
        found: list[_Block] = []
        for blocks, tensor in zip(structure, come, strict=True):
            for at, (start, size) in enumerate(blocks):
                _push(found, _Block(start, size, [tensor[at * width : (at + 1) * width]]))
        whole = like.new_empty(count)
        whole[mine] = _folded(found).tensors[0]
        return self.team.spread_(whole, shares)


def _blocks_of(parts: range) -> list[tuple[int, int]]:
    """(start, size) of the sums that a rank with these parts has kept."""
    found: list[_Block] = []
    for part in parts:
        _push(found, _Block(part, 1))
    return [(block.start, block.size) for block in found]


def _push(blocks: list[_Block], block: _Block) -> None:
    """Add a block on the right; whole subtrees of the tree become one."""
    while blocks and blocks[-1].size == block.size and blocks[-1].start % (2 * block.size) == 0:
        block = _joined(blocks.pop(), block)
    blocks.append(block)


def _joined(left: _Block, right: _Block) -> _Block:
    """Into the tensors of the right one, which are those that live where it is the last."""
    for a, b in zip(left.tensors, right.tensors, strict=True):
        b.add_(a)
    return _Block(left.start, left.size + right.size, right.tensors)


def _folded(blocks: list[_Block]) -> _Block:
    """All of them: what the tree does with a number of parts that is no power of two."""
    while len(blocks) > 1:
        right = blocks.pop()
        blocks.append(_joined(blocks.pop(), right))
    return blocks.pop()


def _pieces(one: Sum, blocks: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """(that piece of every block, where its sum belongs), pieces of about PIECE elements."""
    if not one.upper:
        flat = one.tensor.view(-1)
        for start in range(0, flat.numel(), PIECE):
            here = slice(start, start + PIECE)
            yield [block.view(-1)[here] for block in blocks], [flat[here]]
        return
    for start, stop in panels(len(one.tensor)):
        yield [block[start:stop, start:] for block in blocks], [one.tensor[start:stop, start:]]


def panels(rows: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of the pieces of an upper triangle, each from column `start` on: narrow
    enough that little is sent of what lies below the diagonal.
    """
    start = 0
    while start < rows:
        width = rows - start
        high = min(PIECE // width, max(_LEAST // width, -(-rows // _PANELS)))
        stop = min(rows, start + max(1, high))
        yield start, stop
        start = stop


def _put(where: list[Tensor], total: Tensor) -> None:
    for place in where:
        place.copy_(total.view(place.shape))
