"""Greedy swaps within the budget, kept when the assembled model is measured to be better.

Sensitivities were measured one at a time from the dense model, and errors compound, so their sum
only ranks. A step draws some swaps (a matrix up, another down, whatever the space between allows),
takes the most promising by that sum among those not tried yet, and measures it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from ..ranks import team
from .candidate import Candidate, Space
from .objective import weighted
from .sensitivity import Sensitivities

_DRAWN = 24


Measure = Callable[[Candidate], np.ndarray]


def polish_together(
    space: Space,
    judge: Measure,
    polished: Callable[[Measure], tuple[Candidate, np.ndarray, int]],
) -> tuple[Candidate, np.ndarray, int]:
    """polished(judge), which is polish(), by rank 0; all ranks judge its candidates with it, and
    return what it returns.
    """
    us = team()

    def asked(candidate: Candidate) -> np.ndarray:
        us.tell([candidate.picks, sorted(candidate.dropped)])
        return judge(candidate)

    end = None
    if us.first:
        best, kl, accepted = polished(asked)
        us.tell(None)
        end = [best.picks, sorted(best.dropped), kl.tolist(), accepted]
    else:
        while (told := us.tell()) is not None:
            judge(_told(space, *told))
    picks, dropped, kl, accepted = us.tell(end)
    return _told(space, picks, dropped), np.array(kl), accepted


def _told(space: Space, picks: Sequence[int], dropped: Sequence[int]) -> Candidate:
    return space.candidate(tuple(picks), frozenset(dropped))


def polish(
    space: Space,
    found: Sensitivities,
    start: Candidate,
    start_kl: np.ndarray,
    budget: int,
    alpha: float,
    steps: int,
    seed: int,
    judge: Measure,
    on_step: Callable[[int, int, float], None],
) -> tuple[Candidate, np.ndarray, int]:
    """The best candidate after so many measurements, its KL per language, how many were accepted.

    judge measures KL per language on the windows that decide.
    """
    rng = random.Random(seed)
    best, best_kl, accepted = start, start_kl, 0
    tried = {(start.picks, start.dropped)}
    for step in range(steps):
        worst = np.zeros(len(best_kl))
        worst[int(best_kl.argmax())] = 1.0
        v = (1 - alpha) / len(best_kl) + alpha * worst
        drawn = [_swap(space, found, best, budget, v, rng) for _ in range(_DRAWN)]
        fresh = [c for c in drawn if c is not None and (c.picks, c.dropped) not in tried]
        if fresh:
            candidate = min(fresh, key=lambda c: (float(space.predicted(found, c) @ v), c.picks))
            tried.add((candidate.picks, candidate.dropped))
            kl = judge(candidate)
            if weighted(kl, alpha) < weighted(best_kl, alpha):
                best, best_kl, accepted = candidate, kl, accepted + 1
        on_step(step + 1, steps, weighted(best_kl, alpha))
    return best, best_kl, accepted


def _swap(
    space: Space,
    found: Sensitivities,
    candidate: Candidate,
    budget: int,
    v: np.ndarray,
    rng: random.Random,
) -> Candidate | None:
    """Another choice for one random unit, then the change of another one that costs least and makes
    it fit (or saves most in the room there is).
    """
    alive = [i for i, unit in enumerate(space.units) if unit.layer not in candidate.dropped]
    unit = rng.choice(alive)
    others = [k for k in range(len(space.sizes[unit])) if k != candidate.picks[unit]]
    if not others:
        return None
    picks = list(candidate.picks)
    picks[unit] = rng.choice(others)
    _amend(space, found, candidate, picks, unit, budget, v)
    made = space.candidate(tuple(picks), candidate.dropped)
    return made if made.bytes <= budget else None


def _amend(
    space: Space,
    found: Sensitivities,
    candidate: Candidate,
    picks: list[int],
    fixed: int,
    budget: int,
    v: np.ndarray,
) -> None:
    """Change the pick of one unit other than `fixed` as _swap says, if any change serves."""
    room = budget - space.candidate(tuple(picks), candidate.dropped).bytes
    best: tuple[float, tuple[int, int] | None] = (0.0 if room >= 0 else np.inf, None)
    for other, unit in enumerate(space.units):
        if other == fixed or unit.layer in candidate.dropped:
            continue
        sizes, cost, now = space.sizes[other], found.kl[unit] @ v, picks[other]
        for k in range(len(sizes)):
            change = float(cost[k] - cost[now])
            if k != now and sizes[k] - sizes[now] <= room and change < best[0]:
                best = (change, (other, k))
    if best[1] is not None:
        picks[best[1][0]] = best[1][1]
