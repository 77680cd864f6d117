"""An evaluation's work, dealt out to the ranks of a run: whole batches, the same as in one process,
so that every figure has the same bits; and what one rank has read, on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..ranks import Team, jobs_of, team
from .samples import Samples
from .score import Part, Scores, batches, measure, put_together, scored


class Meter:
    """Progress over everything, told by rank 0 alone: it goes on as that rank's own share does."""

    def __init__(self, total: int, own: int, tell: Callable[[int, str], None]):
        self.total, self.own, self.tell = total, own, tell
        self._done = self._told = 0

    def advance(self, count: int, language: str) -> None:
        """So much of the own share is done; tell() gets what that is of the whole."""
        if not team().first:
            return
        self._done += count
        told = self.total * self._done // self.own
        self.tell(told - self._told, language)
        self._told = told


@dataclass(frozen=True)
class _Job:
    """A batch of one language."""

    sample: Samples
    language: int  # which of the samples
    rows: list[int]

    @property
    def tokens(self) -> int:
        return scored(self.sample.rows, self.rows)

    @property
    def cost(self) -> int:
        """Tokens that run, padding too."""
        return len(self.rows) * max(len(self.sample.rows[i]) for i in self.rows)


def score_all(
    groups: Sequence[Sequence[torch.nn.Module]],
    samples: Sequence[Samples],
    tell: Callable[[int, str], None],
) -> list[list[Scores]]:
    """Scores [language][model]; the models of a group are compared with its first one.

    tell: tokens more that are done, and the language. To be called by every rank, which all get
    everything. InputError with row and language for logits that are not finite, on the rank that
    has that row.
    """
    us, first = team(), groups[0][0]
    cut = [list(batches(s.rows, first.config.vocab_size)) for s in samples]
    jobs = [_Job(s, at, rows) for at, s in enumerate(samples) for rows in cut[at]]
    dealt = jobs_of([job.cost for job in jobs], us.world)
    own = [jobs[number] for number in dealt[us.rank]]
    meter = Meter(sum(j.tokens for j in jobs), sum(j.tokens for j in own), tell)
    device = next(first.parameters()).device
    done: list[list[Part]] = []  # [job][group]
    for job in own:
        done.append([_measured(group, job, device) for group in groups])
        meter.advance(job.tokens, job.sample.language)
    every = _gathered(us, groups, jobs, dealt, done)
    found: list[list[Scores]] = []
    for at, sample in enumerate(samples):
        parts = [part for job, part in zip(jobs, every, strict=True) if job.language == at]
        found.append([])
        for which, group in enumerate(groups):
            of_group = [part[which] for part in parts]
            found[at] += put_together(len(group), sample.rows, cut[at], of_group)
    return found


def _measured(group: Sequence[torch.nn.Module], job: _Job, device: torch.device) -> Part:
    try:
        return measure(group, job.sample.rows, job.rows, device)
    except InputError as error:
        raise InputError(f"{error} of language {job.sample.language}") from None


def _gathered(
    us: Team,
    groups: Sequence[Sequence[torch.nn.Module]],
    jobs: list[_Job],
    dealt: list[list[int]],
    done: list[list[Part]],
) -> list[list[Part]]:
    """Parts [job][group] of all jobs, out of those each rank has done. Sizes are known to all."""
    if us.alone:
        return done
    parts = [part for of_job in done for part in of_job]
    shapes = {
        number: [((len(g), 3, len(job.rows)), (len(g) - 1, job.tokens)) for g in groups]
        for number, job in enumerate(jobs)
    }
    order = [number for numbers in dealt for number in numbers]
    every: list[list[np.ndarray]] = []
    for which, arrays in enumerate(([p.sums for p in parts], [p.kls for p in parts])):
        sizes = [
            sum(int(np.prod(shape[which])) for number in numbers for shape in shapes[number])
            for numbers in dealt
        ]
        wanted = [shape[which] for number in order for shape in shapes[number]]
        dtype = np.float32 if which else np.float64
        every.append(_collected(us, arrays, sizes, wanted, dtype))
    found = iter([Part(*pair) for pair in zip(*every, strict=True)])
    by_job = {number: [next(found) for _ in groups] for number in order}
    return [by_job[number] for number in range(len(jobs))]


def _collected(
    us: Team, arrays: list[np.ndarray], sizes: list[int], shapes: list[tuple], dtype: Any
) -> list[np.ndarray]:
    """The arrays of all ranks, rank after rank; sizes: elements of each rank's."""
    flat = np.concatenate([np.zeros(0, dtype), *(array.ravel() for array in arrays)])
    ends = np.cumsum([0, *sizes]).tolist()
    shares = [slice(a, b) for a, b in pairwise(ends)]
    whole = us.collect(torch.from_numpy(flat), ends[-1], shares).numpy()
    cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    return [part.reshape(s) for part, s in zip(np.split(whole, cuts), shapes, strict=True)]


def from_first(make: Callable[[], list[Samples]]) -> list[Samples]:
    """The rows that rank 0 has made, on every rank; the others need not have read the texts."""
    us = team()
    if us.alone:
        return make()
    samples = make() if us.first else []
    heads = us.tell([(s.language, s.bytes_per_token, list(map(len, s.rows))) for s in samples])
    rows = [row for s in samples for row in s.rows]
    flat = us.from_first(torch.cat(rows) if us.first else None)
    each = iter(flat.split([n for _, _, lengths in heads for n in lengths]))
    return [Samples(lang, [next(each) for _ in lengths], per) for lang, per, lengths in heads]
