"""Compressed matrices of a search, and how they are made: one factor of a stage's Hessian serves
all of its matrices and choices.
"""

from __future__ import annotations

import torch

from ..compress.refine import pattern, rounding
from ..compress.store import Store
from ..errors import InputError
from ..finite import all_finite
from ..formats import Grid
from ..formats.grid import groups
from ..models import Stage
from ..ops import obs as obs_op
from ..ops.cholesky import Factor, cholesky
from ..ranks import least_loaded, team
from .choices import Choice, Costs
from .deal import broadcast_upper
from .whole import Whole

_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class Variants:
    """Compressed matrices by (name, choice): codes, scales and zeros in a Store.

    Each is kept by the rank that made it, `owner`, and lent to the others when a candidate is
    assembled: all ranks together keep what one process would.
    """

    def __init__(self, store: Store, costs: Costs, whole: Whole):
        self.store, self.costs, self.whole = store, costs, whole
        self.owner: dict[tuple[str, Choice], int] = {}
        self._everywhere: set[tuple[str, Choice]] = set()

    def put(self, name: str, choice: Choice, grid: Grid) -> None:
        self.store.put((name, choice), (grid.codes, grid.scales, grid.zeros))

    def weight(self, name: str, choice: Choice) -> torch.Tensor:
        """The weight as the model would run it, of a variant that this rank has made."""
        if choice.dense:
            return self.whole.model.get_submodule(name).weight.data
        return self._dense(choice, self.store.get((name, choice)))

    def lent(self, name: str, choice: Choice, keep: bool) -> torch.Tensor:
        """The same of any rank's variant; to be called by all ranks. keep: every rank keeps it."""
        key, us = (name, choice), team()
        if choice.dense or us.alone or key in self._everywhere:
            return self.weight(name, choice)
        owner = self.owner[key]
        parts = self.store.get(key) if us.rank == owner else self._empty(name, choice)
        for part in parts:
            if part is not None:
                us.broadcast_(part, owner)
        if keep:
            self._everywhere.add(key)
            if us.rank != owner:
                self.store.put(key, parts)
        return self._dense(choice, parts)

    def _dense(self, choice: Choice, parts: _Parts) -> torch.Tensor:
        codes, scales, zeros = parts
        group = self._group(choice, codes.shape[1])
        grid = Grid(codes, scales, zeros, self.costs.settings[choice].bits, group)
        return grid.dense(self.whole.dtype).to(self.whole.device)

    def _empty(self, name: str, choice: Choice) -> _Parts:
        rows, columns = self.costs.shape(name)
        settings, device = self.costs.settings[choice], self.whole.device
        shape = (rows, groups(columns, self._group(choice, columns)))
        return (
            torch.empty(rows, columns, dtype=torch.uint8, device=device),
            torch.empty(shape, dtype=settings.scale_dtype, device=device),
            None if settings.symmetric else torch.empty(shape, dtype=torch.uint8, device=device),
        )

    def _group(self, choice: Choice, columns: int) -> int:
        group = self.costs.settings[choice].group
        return group if group < columns else 0

    # ---- how they are made ----

    def sweep(self, names: list[str], choice: Choice, factor: Factor) -> None:
        """One choice for matrices of one stage."""
        # Rows of a sweep do not know of each other but for an unstructured mask's threshold.
        stacks = [[name] for name in names] if choice.sparsity is not None else [names]
        for stack in stacks:
            self._sweep(stack, choice, factor)

    def _sweep(self, names: list[str], choice: Choice, factor: Factor) -> None:
        settings = self.costs.settings[choice]
        weights = [self.whole.model.get_submodule(name).weight.data for name in names]
        result = obs_op.obs(
            torch.cat(weights), factor=factor, **pattern(settings), **rounding(settings)
        )
        if not all_finite(result.scales):
            raise InputError(
                f"the {choice.name} variant of {names[0]} is not finite; give more texts"
            )
        zeros = None if settings.symmetric else result.zeros.to(torch.uint8)
        scales, group = (
            result.scales.to(settings.scale_dtype),
            self._group(choice, result.W.shape[1]),
        )
        whole = Grid(result.codes, scales, zeros, settings.bits, group)
        row = 0
        for name, W in zip(names, weights, strict=True):
            self.put(name, choice, whole.part(row, row + len(W)))
            row += len(W)


def factors(moments: dict[Stage, torch.Tensor], tokens: int, damp: float) -> dict[Stage, Factor]:
    """The factor of every stage of a layer, on every rank and in the memory of its moments: fp32
    [C, C], the upper triangle of a sum over so many tokens of all ranks.

    One rank makes each, C^3 / 3 flop, and gives it to the others: 2 C^2 bytes, some hundredths of
    the time.
    """
    us, stages = team(), list(moments)
    owners = least_loaded([len(moments[stage]) ** 3 for stage in stages], us.world)
    own: dict[Stage, Factor] = {}
    for stage, owner in zip(stages, owners, strict=True):
        if owner == us.rank:
            own[stage] = cholesky(moments[stage].div_(tokens), damp, overwrite=True)
    facts = us.gather([_facts(own[stage]) if stage in own else None for stage in stages])
    found: dict[Stage, Factor] = {}
    for index, (stage, owner) in enumerate(zip(stages, owners, strict=True)):
        broadcast_upper(moments[stage], owner)
        found[stage] = Factor(moments[stage], *facts[owner][index])
    return found


def _facts(factor: Factor) -> list:
    return [factor.damp, factor.floored, factor.first_floored, factor.mean_diag, factor.dead]
