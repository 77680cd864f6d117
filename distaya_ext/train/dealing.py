"""A step's rows as parts and micro-batches, dealt out to the ranks.

The rows of a step are cut into P parts of neighbouring rows, and each part into micro-batches. The
gradient of a part is the sum over its micro-batches, in their order, and the parts are added as
ranks.sums says: so P and the micro-batches decide the last bits, and how many ranks share the parts
does not. P is the number of ranks that a run began with; one process has one part, and cuts as it
always has.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError
from ..ranks import Parts, Team, team


@dataclass(frozen=True)
class Dealt:
    """cuts: of every part its micro-batches, ranges of rows within a step."""

    parts: Parts
    cuts: tuple[tuple[range, ...], ...]

    @property
    def micros(self) -> list[range]:
        """All micro-batches of a step."""
        return [micro for part in self.cuts for micro in part]

    def first(self, part: int) -> int:
        """Number of a part's first micro-batch."""
        return sum(map(len, self.cuts[:part]))

    def turns(self, even: bool) -> list[tuple[int, int] | None]:
        """(part, micro-batch) that this rank goes through in a step, in order. even: as many on
        every rank, None where there is nothing left to do.
        """
        of_rank = [
            [(p, self.first(p) + i) for p in parts for i in range(len(self.cuts[p]))]
            for parts in self.parts.of_rank
        ]
        own: list[tuple[int, int] | None] = list(of_rank[self.parts.rank])
        most = max(map(len, of_rank)) if even else 1
        return own + [None] * (most - len(own))


def deal(rows: int, micro_rows: int, parts: int) -> Dealt:
    """`rows` of a step in so many parts, micro-batches of up to micro_rows."""
    cuts = []
    for part in Team(0, parts).shares(rows):
        starts = range(part.start, part.stop, micro_rows)
        cuts.append(tuple(range(at, min(at + micro_rows, part.stop)) for at in starts))
    return Dealt(Parts.dealt(parts), tuple(cuts))


def check_rows(rows: int, window: int, parts: int) -> None:
    """UsageError where a step has less than one row for each of its parts."""
    if rows < parts:
        us = team()
        who = f"{parts} parts are asked for" if parts > us.world else f"there are {us.world} ranks"
        raise UsageError(
            f"a step takes {rows} rows of {window} tokens and {who}; make batch_tokens at least "
            f"{parts * window}"
        )
