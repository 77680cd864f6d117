"""Published masks that need no Hessian, written out plainly: magnitude, Wanda, RIA, DaSS.

Sources: Wanda (Sun et al. 2023, section 3); RIA (Zhang et al., ICLR 2024, section 3.2, with the
exponent 0.5 of its code); DaSS (Guo et al. 2024, its code's `wanda_inter` path with alpha 0.5).

W [rows, cols] = (out, in) weights. Masks are bool [rows, cols], True where the weight is KEPT.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[int, int]  # N:M as (kept, of)


def magnitude(W: Tensor, sparsity: float = 0.0, nm: Pair | None = None) -> Tensor:
    """|W|: one threshold for the whole matrix, or n of m inputs kept."""
    return _matrix(W.float().abs(), sparsity, nm)


def wanda(W: Tensor, norms: Tensor, sparsity: float = 0.0, nm: Pair | None = None) -> Tensor:
    """|W_ij| * ||X_j||: the floor(cols*sparsity) least of each row go, or n of m inputs kept.

    norms [cols]: ||X_j||_2 up to one common factor.
    """
    score = W.float().abs() * norms.reshape(1, -1)
    return _keep_nm(score, *nm) if nm is not None else _least_of_rows(score, sparsity)


def ria(
    W: Tensor, norms: Tensor, sparsity: float = 0.0, nm: Pair | None = None, power: float = 0.5
) -> Tensor:
    """(|W_ij| / row sum + |W_ij| / column sum) * ||X_j||^power; compared in the whole matrix.

    A row or column of zeros counts as important as its other sum says, not as NaN.
    """
    A = W.float().abs()
    row, column = A.sum(1, keepdim=True), A.sum(0, keepdim=True)
    share = A / row.where(row > 0, 1.0) + A / column.where(column > 0, 1.0)
    return _matrix(share * norms.reshape(1, -1) ** power, sparsity, nm)


def dass(
    W: Tensor, inner: Tensor, sparsity: float = 0.0, nm: Pair | None = None, alpha: float = 0.5
) -> Tensor:
    """Mask of gate or up: |W_ij| * ||a_i||^alpha, compared within one INPUT column.

    W [d_ff, d]; inner [d_ff]: ||a_i||_2 up to one common factor, a = act(gate) * up, the input of
    down. The floor(d_ff*sparsity) least of each column go, or n of every m consecutive OUTPUTS
    are kept. The same paper prunes down by Wanda (norms = inner) and leaves attention dense.
    """
    score = (W.float().abs() * inner.reshape(-1, 1) ** alpha).t()
    kept = _keep_nm(score, *nm) if nm is not None else _least_of_rows(score, sparsity)
    return kept.t()


def _matrix(score: Tensor, sparsity: float, nm: Pair | None) -> Tensor:
    if nm is not None:
        return _keep_nm(score, *nm)
    threshold = torch.sort(score.flatten())[0][int(score.numel() * sparsity)]
    return score > threshold


def _least_of_rows(score: Tensor, sparsity: float) -> Tensor:
    order = torch.sort(score, dim=1, stable=True)[1]
    drop = torch.zeros_like(score, dtype=torch.bool)
    drop.scatter_(1, order[:, : int(score.shape[1] * sparsity)], True)
    return ~drop


def _keep_nm(score: Tensor, n: int, m: int) -> Tensor:
    drop = torch.zeros_like(score, dtype=torch.bool)
    for j in range(0, score.shape[1], m):
        least = torch.topk(score[:, j : j + m], m - n, dim=1, largest=False)[1]
        drop.scatter_(1, j + least, True)
    return ~drop
