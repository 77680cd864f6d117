"""Jobs that cannot be divided, dealt out to ranks: the same answer on every rank."""

from __future__ import annotations

from collections.abc import Sequence


def least_loaded(costs: Sequence[float], world: int) -> list[int]:
    """A rank for each of these jobs: the costliest first, each to the rank with least to do so far
    (of equals the first).
    """
    load, found = [0.0] * world, [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        found[job] = load.index(min(load))
        load[found[job]] += costs[job]
    return found


def jobs_of(costs: Sequence[float], world: int) -> list[list[int]]:
    """The same as the jobs of each rank, in their order."""
    owners = least_loaded(costs, world)
    return [[job for job, owner in enumerate(owners) if owner == rank] for rank in range(world)]
