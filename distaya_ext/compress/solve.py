"""Maths: one stack of matrices and the statistic of its input in, compressed matrices out. No
hooks, no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UsageError
from ..finite import finite_facts, judge_finite, need_finite
from ..formats import Grid
from ..ops import mask as mask_op
from ..ops import obs as obs_op
from ..ops.cholesky import LateFactor, cholesky_late
from ..ops.cholesky import judge as judge_factor
from ..ops.order import COUPLED
from .ferry import Checks
from .refine import pattern, refined, rounding, visits
from .rows import Rows
from .settings import Settings
from .statistic import Statistic

_ENERGY_ROWS = 512  # rows per matrix whose dense output energy is computed; see output_energy


@dataclass
class Figures:
    """What compressed rows cost, as tensors on their device.

    zeros: int64 [rows]. loss: fp64 [rows], half the mean squared output error, or None without a
    Hessian. energy: the same of the dense output, fp64 [rows], NaN in rows where it was not
    computed. floored: pivots lifted in the factorisation. dead: input columns never active.
    """

    zeros: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    energy: torch.Tensor | None = None
    floored: torch.Tensor | int = 0
    dead: torch.Tensor | int = 0


@dataclass
class Solution:
    """Compressed rows W [rows, columns] and what it cost.

    mask: of the kept weights, None where nothing was pruned by a sweep. grid: the same rows as
    codes, scales and zeros, None when nothing was rounded or when groups are not neighbouring
    columns.
    """

    W: torch.Tensor
    figures: Figures
    grid: Grid | None = None
    mask: torch.Tensor | None = None


def solve(
    weights: list[torch.Tensor],
    settings: Settings,
    statistic: Statistic | None,
    checks: Checks | None = None,
    masks: list[torch.Tensor] | None = None,
) -> Solution:
    """Compress matrices [rows_i, columns] that share an input; the rows come back stacked in order.

    sparsegpt and gptq sweep the whole stack at once. The other methods look at one matrix after the
    other, since their scores and thresholds are those of a matrix. masks: what is kept (bool, one
    per matrix), where the method chose it before. No value is read here; what has to be looked at
    goes to checks (None: it is looked at once).
    """
    checks = checks or Checks(late=False)
    if settings.statistic == "hessian":
        sizes = [len(W) for W in weights]
        mask = None if masks is None else torch.cat(masks)
        return _sweep(weights, settings, statistic, sizes, checks, mask)
    elif settings.method == "dense":
        solution = Solution(torch.cat(weights), Figures())
    else:
        solution = _by_matrix(weights, settings, statistic, checks, masks)
    solution.figures.zeros = _zeros(solution.W)
    return solution


def _zeros(W: torch.Tensor) -> torch.Tensor:
    """int64 [rows]."""
    return (W == 0).sum(dim=1)


def _by_matrix(
    weights: list[torch.Tensor],
    settings: Settings,
    statistic: Statistic | None,
    checks: Checks,
    masks: list[torch.Tensor] | None,
) -> Solution:
    norms = statistic.norms() if statistic is not None else None
    keeps = masks or [_keep(W, settings, norms, checks) for W in weights]
    parts = [_cut_and_round(W, settings, k) for W, k in zip(weights, keeps, strict=True)]
    figures = Figures(dead=(norms == 0).sum() if norms is not None else 0)
    grid = None
    if settings.bits is not None:
        grid = _grid(*(torch.cat(x) for x in zip(*(p[1:] for p in parts), strict=True)), settings)
    return Solution(torch.cat([p[0] for p in parts]), figures, grid)


def _grid(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, settings: Settings
) -> Grid:
    """Codes with the scales (already rounded to their dtype) and zeros that a file stores."""
    group = settings.group if settings.group < codes.shape[1] else 0
    stored = None if settings.symmetric else zeros.to(torch.uint8)
    return Grid(codes, scales.to(settings.scale_dtype), stored, settings.bits, group)


def _sweep(
    weights: list[torch.Tensor],
    settings: Settings,
    statistic: Statistic,
    sizes: list[int],
    checks: Checks,
    mask: torch.Tensor | None,
) -> Solution:
    """One OBS sweep over the stack of matrices; in activation order the busiest inputs come first.
    mask: what is kept; None: the sweep chooses.

    Every process of the run factorises H, which is ready for all of them at once and takes no bytes
    to tell, and sweeps its own rows.
    """
    if mask is None:
        _check_pattern(weights[0], settings)
    rows, H = Rows(sum(sizes)), statistic.matrix()
    W = rows.stacked(weights)
    shape = W.shape
    if checks.late:
        checks.expect(lambda *facts: judge_finite(*facts, shape), *finite_facts(W))
    else:
        need_finite(W)
    figures = Figures(energy=output_energy(W, H, sizes, rows.own), dead=(H.diagonal() == 0).sum())

    def judge(factor: LateFactor) -> None:
        figures.floored = factor.info[0]
        size, damp = len(factor.R), factor.damp  # not the factor itself, which is large
        checks.expect(lambda *facts: judge_factor(*facts, size, damp), factor.info, factor.mean)

    kept = None if mask is None else rows.part(mask)
    if settings.quality == "plain":
        how = pattern(settings, kept)
        if rows.shared:
            every = torch.cat(weights) if settings.order in COUPLED else W
            how["order"] = visits(settings, every, H)
        found = obs_op.obs(W, H, **how, **rounding(settings), overwrite_H=True,
                           later=judge, among=rows.among)  # fmt: skip
    else:
        factor = cholesky_late(H, settings.damp)
        judge(factor)
        T = statistic.wanted(W, H, factor, rows)
        found = refined(W, T, H, factor, settings, kept, rows)
    return _whole(found, figures, settings, rows)


def _whole(found: obs_op.ObsResult, figures: Figures, settings: Settings, rows: Rows) -> Solution:
    """What all processes have found, on each of them."""
    figures.loss, grid = rows.whole(found.loss), None
    figures.energy, figures.zeros = map(rows.whole, (figures.energy, _zeros(found.W)))
    if found.codes is not None and (found.perm is None or settings.static or not settings.group):
        parts = (found.codes, found.scales, found.zeros)
        grid = _grid(*map(rows.whole, parts), settings)
    prunes = settings.sparsity is not None or settings.nm is not None
    asked = prunes and (settings.quality == "high" or not rows.shared)  # by training alone
    return Solution(rows.whole(found.W), figures, grid, rows.whole(found.mask) if asked else None)


def output_energy(
    W: torch.Tensor, H: torch.Tensor, sizes: list[int], own: slice | None = None
) -> torch.Tensor:
    """Half the mean squared dense output of rows: 1/2 diag(W H W^T), fp64 [rows].

    W: the rows `own` (None: all) of a stack of matrices of `sizes` rows. A larger matrix gives
    evenly spaced rows, at most _ENERGY_ROWS of them, and NaN in the others: this serves only to put
    the loss into proportion, and all rows would cost more than the sweep.
    """
    own = own or slice(0, len(W))
    energy = torch.full((W.shape[0],), torch.nan, dtype=torch.float64, device=W.device)
    start = 0
    for size in sizes:
        step = -(-size // _ENERGY_ROWS)
        first = start + max(0, -(-(own.start - start) // step)) * step
        stop = min(start + size, own.stop)
        if first < stop:
            part = slice(first - own.start, stop - own.start, step)
            rows = W[part].float()
            energy[part] = (rows @ H).mul_(rows).sum(dim=1, dtype=torch.float64) / 2
        start += size
    return energy


def _cut_and_round(
    W: torch.Tensor, settings: Settings, keep: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """The compressed matrix and, where it was rounded, its codes, scales and zeros."""
    if keep is not None:
        W = W.masked_fill(~keep, 0.0)
    if settings.bits is None:
        return (W.clone() if keep is None else W,)
    W, *rest = obs_op.quantize(W, rounding(settings)["quant"])
    # A grid always contains 0, so this changes nothing but the sign of -0.0.
    return (W if keep is None else W.masked_fill(~keep, 0.0), *rest)


def _keep(
    W: torch.Tensor, settings: Settings, norms: torch.Tensor | None, checks: Checks
) -> torch.Tensor | None:
    """Mask of kept weights: Wanda compares within a row, magnitude and RIA within the matrix."""
    if settings.method == "rtn":
        return None
    if settings.method == "magnitude":
        scores = mask_op.magnitude(W)
    elif settings.method == "wanda":
        scores = mask_op.wanda(W, norms)
    else:
        scores = mask_op.ria(W, norms)
    _check_pattern(W, settings)
    if settings.nm is not None:
        keep, bad = mask_op.mask_keep_nm(scores, *settings.nm, "inputs")
    else:
        along = "row" if settings.method == "wanda" else "matrix"
        group = W.shape[1] if along == "row" else W.numel()
        count = group - int(group * settings.sparsity)
        keep, bad = mask_op.mask_keep_k(scores, count, along)
    shape = W.shape
    checks.expect(lambda bad: mask_op.need_ranked(bad, shape), bad)
    return keep


def _check_pattern(W: torch.Tensor, settings: Settings) -> None:
    if settings.nm is not None and W.shape[1] % settings.nm[1]:
        n, m = settings.nm
        raise UsageError(
            f"pattern {n}:{m} needs input columns divisible by {m}; this Linear has {W.shape[1]}"
        )
