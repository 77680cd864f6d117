"""The factorisations that solving a layer takes: how many, of which size, and how long they take.

Every process of a run factorises every Hessian itself, so this is what more of them do not shorten;
the inverses of ADMM are dealt out among them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch

from ..checkpoint import Checkpoint
from ..compress.plan import groups
from ..compress.refine import _ADMM
from ..compress.settings import Settings
from ..ops.cholesky import cholesky_late, inverse_, inverse_factor_

LEVELS = _ADMM["levels"]  # each has an inverse of its own


def factorisations(settings: Settings) -> tuple[int, int]:
    """(factors, inverses) that one stack takes: solve._sweep and refine.refined."""
    if settings.statistic != "hessian":
        return 0, 0
    if settings.quality == "plain":
        return 1, 0
    prunes, reordered = settings.pattern is not None, settings.order != "natural"
    sweeps = int(prunes) + int(settings.bits is not None)  # each factorises H in another order
    if prunes and settings.quality == "high":
        return 1 + reordered * (sweeps - 1), LEVELS
    return 1 + reordered * sweeps, 0


def of_layer(
    checkpoint: Checkpoint, plan: Mapping[str, Settings], index: int
) -> Iterator[tuple[int, int, int]]:
    """(columns, factors, inverses) of every stack of a layer."""
    prefix = f"{checkpoint.architecture.layers}.{index}"
    for stage in checkpoint.architecture.stages:
        for names in groups(plan, prefix, stage.names):
            columns = checkpoint.entries[f"{prefix}.{names[0]}.weight"].shape[1]
            yield columns, *factorisations(plan[f"{prefix}.{names[0]}"])


def factoring(
    checkpoint: Checkpoint, plan: Mapping[str, Settings], index: int
) -> tuple[float, float]:
    """Seconds of all factors and of all inverses of a layer, each size timed once on the CPU."""
    one: dict[int, tuple[float, float]] = {}
    all_factors = all_inverses = 0.0
    for columns, factors, inverses in of_layer(checkpoint, plan, index):
        if not factors:
            continue
        factor, inverse = one.get(columns, (0.0, 0.0))
        if columns not in one or (inverses and not inverse):
            one[columns] = factor, inverse = _seconds(columns, inverts=inverses > 0)
        all_factors += factors * factor
        all_inverses += inverses * inverse
    return all_factors, all_inverses


def rounds(world: int) -> int:
    """How many inverses one of so many processes makes of a stack, at most."""
    return -(-LEVELS // world)


def _seconds(columns: int, *, inverts: bool) -> tuple[float, float]:
    """Of one factor, and of one inverse with its own factor (0 where none is wanted)."""
    H = torch.full((columns, columns), 0.01)
    H.diagonal().fill_(1.0)
    start = time.perf_counter()
    factor = cholesky_late(H)
    once = time.perf_counter() - start
    if not inverts:
        return once, 0.0
    U = torch.empty_like(H)
    inverse_factor_(factor.R, U)
    inverse_(U, factor.R)
    return once, time.perf_counter() - start
