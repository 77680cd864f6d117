"""Mean correction: the bias of a Linear takes up what compression changed in its mean output.

    b' = b + W m_d - Q m        for what the dense model gives, m_d and m means of the inputs
    b' = y - Q m                for outputs wanted with mean y (twin.py), b taken off before

It needs no error of the weights to be small and costs nothing at inference; Linears without a bias
get none. Sources: bias correction of data-free quantisation (Nagel et al. 2019, section 4.2).
"""

from __future__ import annotations

import torch

from ..ranks import Sum


class Means:
    """Weighted mean of tokens [T, columns], fp64, and of what is aimed at beside them, which has
    `wanted` numbers (0: nothing is).
    """

    def __init__(self, columns: int, device: torch.device, wanted: int = 0):
        self._x = torch.zeros(columns, dtype=torch.float64, device=device)
        self._wanted = torch.zeros(wanted, dtype=torch.float64, device=device) if wanted else None
        self._weight = torch.zeros((), dtype=torch.float64, device=device)

    def sums(self) -> list[Sum]:
        """What add() adds to."""
        found = [Sum(self._x), Sum(self._weight)]
        return found if self._wanted is None else [*found, Sum(self._wanted)]

    def add(
        self, x: torch.Tensor, wanted: torch.Tensor | None, weights: torch.Tensor | None
    ) -> None:
        """Add tokens x [T, columns], wanted [T, rows or columns], weights fp32 [T] or all 1."""
        self._x += _total(x, weights)
        if wanted is not None:
            more = _total(wanted, weights)
            self._wanted = more if self._wanted is None else self._wanted.add_(more)
        self._weight += x.shape[0] if weights is None else weights.sum(dtype=torch.float64)

    def inputs(self) -> torch.Tensor:
        """m, fp64 [columns]."""
        return self._x / self._weight

    def wanted(self) -> torch.Tensor | None:
        """m_d or y, fp64."""
        return None if self._wanted is None else self._wanted / self._weight


def corrected(
    b: torch.Tensor, W: torch.Tensor, Q: torch.Tensor, means: Means, *, outputs: bool
) -> torch.Tensor:
    """b' [rows] in b's dtype for dense W and compressed Q [rows, columns].

    outputs: what was aimed at are outputs without the bias, and b already came off them.
    """
    m, wanted = means.inputs(), means.wanted()
    aim = wanted if outputs else W.double() @ (m if wanted is None else wanted)
    return (b.double() + aim - Q.double() @ m).to(b.dtype)


def _total(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:
        return x.sum(dim=0, dtype=torch.float64)
    return (x.double() * weights[:, None]).sum(dim=0)
