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


class Aim:
    """Gathers Y (outputs=True) or G from calibration tokens, then corrects weights."""

    def __init__(self, rows: int, columns: int, device: torch.device, *, outputs: bool):
        self.outputs = outputs
        self.tokens = 0
        self._weight: torch.Tensor | None = None  # sum of the token weights, fp64
        self._moment: CrossMoment | torch.Tensor | None = CrossMoment(
            rows if outputs else columns, columns, device
        )

    def add(self, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens: y [T, rows] wanted or x_d [T, columns]; x [T, columns]; weights fp32 [T]."""
        self.tokens += x.shape[0]
        self._moment.add(y, x, weights)
        if weights is not None:
            more = weights.sum(dtype=torch.float64)
            self._weight = more if self._weight is None else self._weight + more

    def weights(
        self, W: torch.Tensor, H: torch.Tensor, R: torch.Tensor, *, last: bool = True
    ) -> torch.Tensor:
        """W' fp32 [rows, columns] for dense W, H fp32 and its factor R (H' = R R^T). last: what was
        gathered is given up.
        """
        share = shrink(self.tokens, W.shape[1])
        if not share:
            return W.float()
        if isinstance(self._moment, CrossMoment):
            self._moment = self._finish(self._moment)
        moment = self._moment
        if last:
            self._moment = None
        shift = moment - W.float() @ H if self.outputs else W.float() @ (moment - H)
        solve_(shift, R)
        return shift.mul_(share).add_(W)

    def _finish(self, moment: CrossMoment) -> torch.Tensor:
        if self._weight is None:
            return moment.finish()
        return moment.G.div_(self._weight)  # as finish(), which would wait for the weights


def shrink(tokens: int, columns: int) -> float:
    """Share of a correction of `columns` parameters a row that so many tokens support."""
    return max(0.0, 1.0 - columns / max(1, tokens))
