"""The knapsack against every allocation there is, on instances small enough to write them out."""

import itertools

import numpy as np
import pytest

from distaya_ext.errors import InputError
from distaya_ext.search.allocate import Part, Unit, allocate, least_bytes
from distaya_ext.search.objective import best_allocation, weighted


def instance(seed: int, *, drops: bool, ties: bool = False) -> list[Part]:
    """Three parts of two or three units with two to four options each."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(3):
        units = []
        for _ in range(int(rng.integers(2, 4))):
            count = int(rng.integers(2, 5))
            size = rng.integers(1, 6 if ties else 1000, count)
            cost = rng.integers(0, 4, count).astype(float) if ties else rng.exponential(1.0, count)
            units.append(Unit(size, cost))
        dropped = (0, float(rng.exponential(4.0))) if drops else None
        parts.append(Part(units, int(rng.integers(0, 50)), dropped))
    return parts


def every(parts: list[Part]):
    """(bytes, cost, picks) of every allocation."""
    ways = []
    for part in parts:
        found = [None] if part.dropped is not None else []
        found += [list(p) for p in itertools.product(*(range(len(u.bytes)) for u in part.units))]
        ways.append(found)
    for picks in itertools.product(*ways):
        size, cost = 0, 0.0
        for part, taken in zip(parts, picks, strict=True):
            if taken is None:
                size, cost = size + part.dropped[0], cost + part.dropped[1]
            else:
                size += part.base + sum(u.bytes[k] for u, k in zip(part.units, taken, strict=True))
                cost += sum(u.cost[k] for u, k in zip(part.units, taken, strict=True))
        yield int(size), float(cost), list(picks)


@pytest.mark.parametrize("drops", [False, True], ids=["kept", "drops"])
@pytest.mark.parametrize("ties", [False, True], ids=["reals", "ties"])
@pytest.mark.parametrize("seed", range(6))
def test_equals_brute_force_at_every_budget(seed, ties, drops):
    parts = instance(seed, drops=drops, ties=ties)
    all_of_them = list(every(parts))
    sizes = sorted({size for size, _, _ in all_of_them})
    assert least_bytes(parts) == sizes[0]
    for budget in [*sizes[:: max(1, len(sizes) // 12)], sizes[-1] + 5]:
        found = allocate(parts, budget)
        best = min(cost for size, cost, _ in all_of_them if size <= budget)
        assert found.exact
        assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert found.bytes <= budget
        sums = [(s, c) for s, c, picks in all_of_them if picks == found.picks]
        assert sums == [(found.bytes, pytest.approx(found.cost))]


def test_a_budget_below_the_least_is_refused():
    parts = instance(0, drops=False)
    with pytest.raises(InputError, match=f"below the least, {least_bytes(parts)} bytes"):
        allocate(parts, least_bytes(parts) - 1)


def test_a_thinned_list_stays_feasible_and_close():
    rng = np.random.default_rng(1)
    units = [Unit(rng.integers(1, 10**6, 5), rng.exponential(1.0, 5)) for _ in range(40)]
    parts = [Part(units[i : i + 5]) for i in range(0, 40, 5)]
    budget = int(sum(np.median(u.bytes) for u in units))
    whole, thin = allocate(parts, budget), allocate(parts, budget, most=40)
    assert whole.exact
    assert thin.bytes <= budget
    assert whole.cost <= thin.cost <= 1.05 * whole.cost


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_reweighting_comes_close_to_the_best_worst_language(seed, lam):
    rng = np.random.default_rng(seed)
    units = [
        [(np.sort(rng.integers(1, 60, 3))[::-1], rng.exponential(1.0, (3, 4))) for _ in range(3)]
        for _ in range(2)
    ]
    budget = int(sum(np.median(size) for part in units for size, _ in part))
    kl, found = best_allocation(units, [0, 0], [None, None], budget, lam)
    every_kl = []
    for picks in itertools.product(range(3), repeat=6):
        flat = [pair for part in units for pair in part]
        if sum(size[k] for (size, _), k in zip(flat, picks, strict=True)) <= budget:
            every_kl.append(sum(cost[k] for (_, cost), k in zip(flat, picks, strict=True)))
    best = min(weighted(k, lam) for k in every_kl)
    assert found.bytes <= budget
    # Weights of languages reach the convex hull of what is possible; the mean lies on it.
    assert weighted(kl, lam) <= best * {0.0: 1 + 1e-9, 0.5: 1.15, 1.0: 1.3}[lam]
