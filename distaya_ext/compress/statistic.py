"""What the inputs of a stage tell the maths: summed chunk by chunk, on each process its own."""

from __future__ import annotations

import torch

from ..ops.cholesky import LateFactor
from ..ops.hessian import Hessian, column_sq_, symmetrize_
from ..ranks import Sum
from .aim import Aim
from .bias import Means
from .rows import Rows


class Statistic:
    """What is gathered from the inputs of one stage: a Hessian or only the column norms.

    aim, means: what its Linears should give, and means for their biases, are gathered as well.
    readers: how many stacks will be solved with it, each of which takes the matrix once.
    """

    def __init__(
        self,
        kind: str,
        columns: int,
        device: torch.device,
        *,
        aim: Aim | None = None,
        means: Means | None = None,
        readers: int = 1,
    ):
        self.kind = kind
        self.aim = aim
        self.means = means
        self.readers = readers
        self.columns = columns
        self.tokens = 0
        self._hessian = Hessian(columns, device) if kind == "hessian" else None
        self._matrix: torch.Tensor | None = None
        self._squares = torch.zeros(columns, dtype=torch.float32, device=device)
        self._weight: torch.Tensor | None = None  # sum of the token weights, fp64

    def add(
        self,
        x: torch.Tensor,
        wanted: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add tokens x [T, columns], bf16, fp16 or fp32, and what Aim.add takes beside them.

        weights: fp32 [T], None: all 1.
        """
        self.tokens += x.shape[0]
        if self.aim is not None:
            self.aim.add(wanted, x, weights)
        if self.means is not None:
            self.means.add(x, wanted, weights)
        if self._hessian is not None:
            self._hessian.add(x, weights)
        else:
            column_sq_(self._squares, x, weights)
        if weights is not None:
            self.sums(weighted=True)
            self._weight += weights.sum(dtype=torch.float64)

    def sums(self, *, weighted: bool) -> list[Sum]:
        """All that add() adds to; weighted: whether it will be given weights."""
        if weighted and self._weight is None:
            self._weight = torch.zeros((), dtype=torch.float64, device=self._squares.device)
        found = [] if self._weight is None else [Sum(self._weight)]
        hessian = self._hessian
        found.append(Sum(self._squares) if hessian is None else Sum(hessian.H, upper=True))
        if self.aim is not None:
            found += self.aim.sums(weighted=weighted)
        return found if self.means is None else found + self.means.sums()

    def count(self, tokens: int) -> None:
        """So many tokens were added, by all processes together."""
        self.tokens = tokens
        if self.aim is not None:
            self.aim.tokens = tokens

    def matrix(self) -> torch.Tensor:
        """Mean of x x^T, fp32 [columns, columns], symmetric; the caller may overwrite it.

        The running sum is given up, and with the last reader the matrix, too.
        """
        if self._hessian is not None:
            self._matrix, self._hessian = self._finish(self._hessian), None
        self.readers -= 1
        if self.readers > 0:
            return self._matrix.clone()
        H, self._matrix = self._matrix, None
        return H

    def _finish(self, hessian: Hessian) -> torch.Tensor:
        # As finish(), which would wait for the weights, and knows of this process's tokens alone.
        H = hessian.H.div_(self.tokens if self._weight is None else self._weight)
        symmetrize_(H)
        return H

    def wanted(
        self, W: torch.Tensor, H: torch.Tensor, factor: LateFactor, rows: Rows
    ) -> torch.Tensor:
        """The weights to compress towards, fp32: W itself where nothing is aimed at. W: these rows
        of the matrix.
        """
        if self.aim is None:
            return W.float()
        own, last = rows.own, self.readers <= 0
        return self.aim.weights(W, H, factor.R, rows=own, all_rows=rows.count, last=last)

    def norms(self) -> torch.Tensor:
        """Weighted root mean square of each input column, fp32 [columns]; of a Hessian before
        matrix() is called.
        """
        if self._hessian is not None:
            divisor = self.tokens if self._weight is None else self._weight
            return (self._hessian.H.diagonal() / divisor).float().sqrt_()
        if self._weight is None:
            return (self._squares / max(1, self.tokens)).sqrt_()
        return (self._squares / self._weight).float().sqrt_()
