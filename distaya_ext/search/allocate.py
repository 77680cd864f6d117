"""The multiple-choice knapsack: one choice for every matrix, least cost within a budget of bytes.

Dynamic programming over lists of states that hold their exact bytes. A state falls when another has
no more bytes and no more cost (Pareto), or when the Lagrangian bound shows that nothing it can
become beats what is known already: with lam >= 0 and `rest` what is still to be chosen,

    cost + lam * bytes + sum_rest min (cost + lam * bytes) - lam * budget

is a lower bound of every completion. With that the lists stay short; should one outgrow `most`
states, the cheapest of every cell of bytes is kept and the answer is no longer proved (exact=False)
but still feasible to the byte. (Kellerer, Pferschy & Pisinger 2004, chapter 11.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError

MOST_STATES = 1 << 16
_STEPS = 60  # halvings of the interval of the multiplier


@dataclass(frozen=True)
class Unit:
    """Options of one matrix (or of matrices that go together): bytes int64 [k], cost [k]."""

    bytes: np.ndarray
    cost: np.ndarray


@dataclass(frozen=True)
class Part:
    """Units that may vanish together (a decoder layer) for `dropped` = (bytes, cost), if it is
    given; `base` bytes are taken unless they do.
    """

    units: list[Unit]
    base: int = 0
    dropped: tuple[int, float] | None = None


@dataclass(frozen=True)
class Allocation:
    """picks[part][unit] is an option, picks[part] None a part that was dropped."""

    picks: list[list[int] | None]
    bytes: int
    cost: float
    exact: bool = True


@dataclass
class _States:
    """Partial choices. back: how to find what a state came from, newest step last."""

    bytes: np.ndarray
    cost: np.ndarray
    back: list[tuple] = field(default_factory=list)

    def take(self, keep: np.ndarray) -> None:
        self.bytes, self.cost = self.bytes[keep], self.cost[keep]
        kind, *rest = self.back[-1]
        self.back[-1] = (kind, *(x[keep] if isinstance(x, np.ndarray) else x for x in rest))


def least_bytes(parts: list[Part]) -> int:
    """Bytes of the smallest allocation."""
    return sum(_least(part) for part in parts)


def _least(part: Part) -> int:
    kept = part.base + sum(int(unit.bytes.min()) for unit in part.units)
    return min(kept, part.dropped[0]) if part.dropped is not None else kept


def allocate(parts: list[Part], budget: int, most: int = MOST_STATES) -> Allocation:
    """The cheapest allocation of at most `budget` bytes. InputError when there is none."""
    if least_bytes(parts) > budget:
        raise InputError(
            f"a budget of {budget} bytes is below the least, {least_bytes(parts)} bytes"
        )
    lam, known = _relax(parts, budget)
    tails = [_tail(part, lam) for part in parts]
    ahead_cost = np.append(np.cumsum([t[0] for t in tails[::-1]])[::-1], 0.0)
    ahead_bytes = np.append(np.cumsum([_least(part) for part in parts][::-1])[::-1], 0)
    limit = known.cost * (1 + 1e-12) + 1e-300
    bounds = _Bounds(lam, budget, limit, most)
    states = _States(np.zeros(1, np.int64), np.zeros(1), [])
    for index, part in enumerate(parts):
        later = (float(ahead_cost[index + 1]), int(ahead_bytes[index + 1]))
        states = _through(states, part, later, bounds)
        if not len(states.bytes):  # thinning lost the way to the best; what is known stands
            return Allocation(known.picks, known.bytes, known.cost, exact=False)
    best = int(states.cost.argmin())
    total, cost = int(states.bytes[best]), float(states.cost[best])
    if cost > known.cost:
        return Allocation(known.picks, known.bytes, known.cost, exact=not bounds.thinned)
    return Allocation(_backtrack(states.back, best, parts), total, cost, not bounds.thinned)


@dataclass
class _Bounds:
    lam: float
    budget: int
    limit: float
    most: int
    thinned: bool = False

    def prune(self, states: _States, cost_ahead: float, bytes_ahead: int) -> None:
        """Drop what cannot fit, cannot win, or is beaten by another state."""
        lower = states.cost + self.lam * (states.bytes - self.budget) + cost_ahead
        slack = 1e-12 * (abs(cost_ahead) + self.lam * self.budget)
        keep = (lower <= self.limit + slack) & (states.bytes + bytes_ahead <= self.budget)
        states.take(np.flatnonzero(keep))
        order = np.lexsort((states.cost, states.bytes))
        cost = states.cost[order]
        better = np.ones(len(order), bool)
        better[1:] = cost[1:] < np.minimum.accumulate(cost)[:-1]
        states.take(order[better])
        if len(states.bytes) > self.most:
            self.thinned = True
            span = int(states.bytes[-1] - states.bytes[0]) + 1
            cell = (states.bytes - states.bytes[0]) * self.most // span
            last = np.append(cell[1:] != cell[:-1], True)  # costs fall, so the last is the cheapest
            states.take(np.flatnonzero(last))


def _through(states: _States, part: Part, later: tuple[float, int], bounds: _Bounds) -> _States:
    """All ways through one part."""
    here = [_unit_tail(unit, bounds.lam) for unit in part.units]
    cost_ahead = sum(cost for cost, _ in here) + later[0]
    bytes_ahead = sum(least for _, least in here) + later[1]
    kept = _States(states.bytes + part.base, states.cost.copy(), list(states.back))
    for unit, (cost, least) in zip(part.units, here, strict=True):
        cost_ahead, bytes_ahead = cost_ahead - cost, bytes_ahead - least
        grown = (kept.bytes[:, None] + unit.bytes).ravel()
        spent = (kept.cost[:, None] + unit.cost).ravel()
        came, pick = np.divmod(np.arange(len(grown)), len(unit.bytes))
        kept = _States(grown, spent, [*kept.back, ("unit", came, pick)])
        bounds.prune(kept, cost_ahead, bytes_ahead)
    if part.dropped is None:
        return kept
    size, cost = part.dropped
    gone = _States(states.bytes + size, states.cost + cost, states.back)
    which = np.concatenate([np.zeros(len(kept.bytes), int), np.ones(len(gone.bytes), int)])
    came = np.concatenate([np.arange(len(kept.bytes)), np.arange(len(gone.bytes))])
    both = _States(
        np.concatenate([kept.bytes, gone.bytes]),
        np.concatenate([kept.cost, gone.cost]),
        [("either", which, came, kept.back, gone.back)],
    )
    bounds.prune(both, *later)
    return both


def _backtrack(back: list[tuple], state: int, parts: list[Part]) -> list[list[int] | None]:
    picks: list[list[int] | None] = []
    for part in reversed(parts):
        taken: list[int] | None = []
        if part.dropped is not None:
            _, which, came, kept, gone = back[-1]
            dropped, state = bool(which[state]), int(came[state])
            back = gone if dropped else kept
            taken = None if dropped else taken
        if taken is not None:
            for _ in part.units:
                _, came, pick = back[-1]
                taken.append(int(pick[state]))
                state, back = int(came[state]), back[:-1]
            taken.reverse()
        picks.append(taken)
    return picks[::-1]


# ---- the Lagrangian relaxation ----


def _unit_tail(unit: Unit, lam: float) -> tuple[float, int]:
    return float((unit.cost + lam * unit.bytes).min()), int(unit.bytes.min())


def _tail(part: Part, lam: float) -> tuple[float, list[int] | None]:
    """Least cost + lam * bytes of a part, and its picks."""
    total, picks = lam * part.base, []
    for unit in part.units:
        value = unit.cost + lam * unit.bytes
        picks.append(int(value.argmin()))
        total += float(value.min())
    if part.dropped is not None:
        gone = part.dropped[1] + lam * part.dropped[0]
        if gone < total:
            return gone, None
    return total, picks


def _account(parts: list[Part], picks: list[list[int] | None]) -> tuple[int, float]:
    size, cost = 0, 0.0
    for part, taken in zip(parts, picks, strict=True):
        if taken is None:
            size, cost = size + part.dropped[0], cost + part.dropped[1]
            continue
        size += part.base + sum(int(u.bytes[p]) for u, p in zip(part.units, taken, strict=True))
        cost += sum(float(u.cost[p]) for u, p in zip(part.units, taken, strict=True))
    return size, cost


def _relax(parts: list[Part], budget: int) -> tuple[float, Allocation]:
    """A multiplier near the best one, and a feasible allocation: the relaxed one, filled up."""

    def at(lam: float) -> Allocation:
        picks = [_tail(part, lam)[1] for part in parts]
        return Allocation(picks, *_account(parts, picks))

    free = at(0.0)
    if free.bytes <= budget:
        return 0.0, _fill(parts, free, budget)
    low, high = 0.0, 1e-12
    while (found := at(high)).bytes > budget and high < 1e12:
        low, high = high, high * 8
    if found.bytes > budget:
        picks = [_smallest(part) for part in parts]
        return low, _fill(parts, Allocation(picks, *_account(parts, picks)), budget)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        trial = at(middle)
        if trial.bytes > budget:
            low = middle
        else:
            high, found = middle, trial
    return high, _fill(parts, found, budget)


def _smallest(part: Part) -> list[int] | None:
    if part.dropped is not None and part.dropped[0] == _least(part):
        return None
    return [int(np.lexsort((unit.cost, unit.bytes))[0]) for unit in part.units]


def _fill(parts: list[Part], found: Allocation, budget: int) -> Allocation:
    """Spend what is left: again and again the change of one unit that saves most and fits."""
    picks = [None if taken is None else list(taken) for taken in found.picks]
    size = found.bytes
    while True:
        best = (0.0, None)
        for i, taken in enumerate(picks):
            for j, pick in enumerate(taken or []):
                unit = parts[i].units[j]
                more = unit.bytes - unit.bytes[pick]
                saved = np.where(more <= budget - size, unit.cost[pick] - unit.cost, -1.0)
                k = int(saved.argmax())
                if saved[k] > best[0]:
                    best = (float(saved[k]), (i, j, k, int(more[k])))
        if best[1] is None:
            return Allocation(picks, *_account(parts, picks))
        i, j, k, more = best[1]
        picks[i][j] = k
        size += more
