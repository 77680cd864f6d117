"""Maths: which weights to compress towards, so that errors made earlier are made up for.

Least squares for a Linear W that now sees x and should give y (or W x_d):

    W' = W + a (Y - W H) H'^-1        Y = mean y x^T [rows, columns], outputs wanted
    W' = W + a W (G - H) H'^-1        G = mean x_d x^T [columns, columns], dense inputs

with H = mean x x^T and H' the damped H. a = 1 - columns / tokens (0 when negative) shrinks a fit
that so many parameters could make to so many tokens: of the gain seen on the calibration tokens,
that share is expected to hold elsewhere.
"""

from __future__ import annotations

import torch

from ..ops.cholesky import solve_
from ..ops.hessian import CrossMoment
from ..ops.refit import multiply_
from ..ranks import Sum


class Aim:
    """Gathers Y (outputs=True) or G from calibration tokens, then corrects weights."""

    def __init__(self, rows: int, columns: int, device: torch.device, *, outputs: bool):
        self.outputs = outputs
        self.tokens = 0
        self._weight: torch.Tensor | None = None  # sum of the token weights, fp64
        self._moment: CrossMoment | torch.Tensor | None = CrossMoment(
            rows if outputs else columns, columns, device
        )

    def sums(self, *, weighted: bool) -> list[Sum]:
        """What add() adds to; weighted: whether it will be given weights."""
        if not weighted:
            return [Sum(self._moment.G)]
        if self._weight is None:
            self._weight = torch.zeros((), dtype=torch.float64, device=self._moment.G.device)
        return [Sum(self._moment.G), Sum(self._weight)]

    def add(self, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens: y [T, rows] wanted or x_d [T, columns]; x [T, columns]; weights fp32 [T]."""
        self.tokens += x.shape[0]
        self._moment.add(y, x, weights)
        if weights is not None:
            self.sums(weighted=True)
            self._weight += weights.sum(dtype=torch.float64)

    def weights(
        self,
        W: torch.Tensor,
        H: torch.Tensor,
        R: torch.Tensor,
        *,
        rows: slice | None = None,
        all_rows: int = 0,
        last: bool = True,
    ) -> torch.Tensor:
        """W' fp32 [rows, columns] for dense W, H fp32 and its factor R (H' = R R^T).

        rows, all_rows: which of how many rows W has, where it is a part of the matrix; their bits
        are those of the whole. last: what was gathered is given up.
        """
        share = shrink(self.tokens, W.shape[1])
        if not share:
            return W.float()
        if isinstance(self._moment, CrossMoment):
            self._moment = self._finish(self._moment)
        moment = self._moment
        if moment is None:
            raise ValueError("what was gathered was given up when the last reader had it")
        if last:
            self._moment = None
        if self.outputs:
            shift = moment if rows is None else moment[rows]
            shift = shift if last else shift.clone()
            multiply_(shift, -W.float(), H, all_rows)
        else:
            shift = torch.zeros(W.shape, dtype=torch.float32, device=W.device)
            multiply_(shift, W.float(), moment.sub_(H) if last else moment - H, all_rows)
        solve_(shift, R, all_rows)
        return shift.mul_(share).add_(W)

    def _finish(self, moment: CrossMoment) -> torch.Tensor:
        # As finish(), which would wait for the weights, and knows of this process's tokens alone.
        return moment.G.div_(self.tokens if self._weight is None else self._weight)


def shrink(tokens: int, columns: int) -> float:
    """Share of a correction of `columns` parameters a row that so many tokens support."""
    return max(0.0, 1.0 - columns / max(1, tokens))
