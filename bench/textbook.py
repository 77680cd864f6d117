"""The textbook PyTorch route, written out plainly: the ruler for speed, masks, codes and quality.

It computes what the published SparseGPT and GPTQ do, in their order and with their counting
conventions: fp32 X^T X with a running mean, dead columns, relative damping, Cholesky -> inverse ->
upper Cholesky, a blocked sweep with a full sort for the threshold. It needs torch only.

Sources: SparseGPT (Frantar & Alistarh 2023, algorithm 1); GPTQ (Frantar et al. 2022, algorithm 1).
Masks without a Hessian (magnitude, Wanda, RIA, DaSS) stand in textbook_masks.py.

Letters: W [rows, cols] = (out, in) weights, X [tokens, cols] inputs, H [cols, cols] = 2/N X^T X,
U upper with H^-1 = U^T U. Masks are bool [rows, cols], True where the weight is KEPT.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bench.textbook_masks import dass, magnitude, ria, wanda

__all__ = [
    "Hessian",
    "Result",
    "dass",
    "factor",
    "fix_dead",
    "gptq",
    "grid",
    "magnitude",
    "ria",
    "round_to",
    "rtn",
    "sweep",
    "wanda",
]


class Result(NamedTuple):
    """What a sweep returns; W, mask, codes are always in the ORIGINAL column order.

    W, mask (True = kept), codes (uint8 or None) [rows, cols]; weight = scale * (code - zero).
    scales, zeros [rows, groups] or None, one column per group of inputs (or one for the row).
    loss [rows] = 1/2 (Q - W) H' (Q - W)^T with H' the damped Hessian.
    perm [cols] int64: column order of the sweep, None for the natural one; a dynamic group g
    then covers columns perm[g*group:(g+1)*group].
    """

    W: Tensor
    mask: Tensor
    codes: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    loss: Tensor
    perm: Tensor | None = None


class Hessian:
    """Running H = 2/N sum x x^T over N sequences: fp32, full product, as published."""

    def __init__(self, columns: int, dtype: torch.dtype = torch.float32):
        self.H = torch.zeros(columns, columns, dtype=dtype)
        self.sequences = 0

    def add(self, X: Tensor) -> None:
        """X [tokens, cols] (one sequence) or [sequences, tokens, cols], any float dtype."""
        count = 1 if X.dim() == 2 else X.shape[0]
        self.H *= self.sequences / (self.sequences + count)
        self.sequences += count
        Xt = X.reshape(-1, X.shape[-1]).t()
        Xt = math.sqrt(2 / self.sequences) * Xt.to(self.H.dtype)
        self.H += Xt.matmul(Xt.t())

    def column_norms(self) -> Tensor:
        """||X_j||_2 up to one common factor, [cols]: what Wanda multiplies |W| by."""
        return self.H.diagonal().sqrt()


def fix_dead(W: Tensor, H: Tensor) -> None:
    """Columns whose input never fires: unit diagonal in H, zero weight. In place."""
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0


def factor(H: Tensor, damp: float = 0.01, *, overwrite: bool = False) -> Tensor:
    """Upper Cholesky factor U of (H + damp * mean(diag H) * I)^-1 by chol -> inverse -> chol."""
    H = H if overwrite else H.clone()
    H.diagonal().add_(damp * H.diagonal().mean())
    L = torch.linalg.cholesky(H)
    inverse = torch.cholesky_inverse(L)
    return torch.linalg.cholesky(inverse, upper=True)


def grid(x: Tensor, bits: int, symmetric: bool = False, mse: bool = False):
    """Min-max grid per row of x [rows, n]: (scale, zero), each [rows, 1].

    The range always contains 0, so a pruned weight is exactly representable. mse=True shrinks
    the range to 1 - i/100 (i < 80) of itself where that lowers sum |q - x|^2.4 (GPTQ's search).
    """
    top = 2**bits - 1
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(low.abs(), high)
        low = torch.where(low < 0, -high, low)
    empty = (low == 0) & (high == 0)
    low = torch.where(empty, -1.0, low)
    high = torch.where(empty, 1.0, high)

    def place(low: Tensor, high: Tensor):
        scale = (high - low) / top
        zero = torch.full_like(scale, (top + 1) / 2) if symmetric else torch.round(-low / scale)
        return scale.unsqueeze(1), zero.unsqueeze(1)

    scale, zero = place(low, high)
    if mse:
        best = torch.full_like(low, float("inf"))
        for i in range(80):
            shrink = 1 - i / 100
            s, z = place(shrink * low, shrink * high)
            error = (round_to(x, s, z, bits)[0] - x).abs().pow(2.4).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better.unsqueeze(1), s, scale)
            zero = torch.where(better.unsqueeze(1), z, zero)
    return scale, zero


def round_to(x: Tensor, scale: Tensor, zero: Tensor, bits: int):
    """Nearest grid point of x (shapes broadcast): (value, code as float)."""
    code = torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1)
    return scale * (code - zero), code


class _Grids:
    """Which (scale, zero) column j uses: per row, static groups or groups on entry (GPTQ)."""

    def __init__(self, W: Tensor, dense: Tensor, bits, group, symmetric, mse, static, perm):
        self.bits, self.group, self.options = bits, group, (bits, symmetric, mse)
        self.groups: list[tuple[Tensor, Tensor]] = []
        self.dynamic = bool(bits) and group > 0 and not static
        self.perm = perm if static else None
        if bits and group == 0:
            self.groups = [grid(dense, *self.options)]
        elif bits and static:
            self.groups = [grid(part, *self.options) for part in W.split(group, dim=1)]

    def enter(self, j: int, weights: Tensor) -> None:
        """At the first column of a dynamic group: take its grid from `weights`."""
        if self.dynamic and j % self.group == 0:
            self.groups.append(grid(weights, *self.options))

    def round(self, j: int, q: Tensor):
        j = j if self.perm is None else int(self.perm[j])
        scale, zero = self.groups[j // self.group if self.group else 0]
        return round_to(q, scale[:, 0], zero[:, 0], self.bits)

    def stacked(self):
        if not self.bits:
            return None, None
        return tuple(torch.cat(column, dim=1) for column in zip(*self.groups, strict=True))


def sweep(
    W: Tensor,
    H: Tensor | None = None,
    *,
    U: Tensor | None = None,
    sparsity: float = 0.0,
    nm: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    bits: int = 0,
    group: int = 0,
    symmetric: bool = False,
    mse: bool = False,
    static: bool = False,
    stale: bool = True,
    order: str = "natural",
    damp: float = 0.01,
    block: int = 128,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """SparseGPT (sparsity | nm | mask), GPTQ (bits only) or both in one pass, as published.

    W [rows, cols]; H [cols, cols] symmetric, or U = factor(H) when already factorised (then dead
    columns must already be fixed and order must be natural). Neither is modified.
    sparsity: one threshold per block of columns over all rows, the element at index
    floor(rows*block*sparsity) of the full sort, and everything <= it goes (so one more than asked,
    plus ties). nm = (kept, of). mask: bool, True = kept. group 0 = one grid per whole dense row.
    stale: the published code takes a group's grid from weights that lack the updates made inside
    the current block; it matters only for group < block. False takes the current weights.
    Raises torch.linalg.LinAlgError when the damped H is not positive definite.
    """
    dense = W.to(dtype)
    W = dense.clone()
    perm = None
    if U is None:
        H = H.to(dtype).clone()
        fix_dead(W, H)
        if order == "activation":
            perm = torch.argsort(H.diagonal(), descending=True)
    fixed = W.clone() if static else W
    if perm is not None:
        W, H = W[:, perm], H[perm][:, perm]
        mask = None if mask is None else mask[:, perm]
    if U is None:
        U = factor(H, damp, overwrite=True)
    grids = _Grids(fixed, dense, bits, group, symmetric, mse, static, perm)
    keep = torch.ones_like(W, dtype=torch.bool)
    codes = torch.zeros_like(W, dtype=torch.uint8) if bits else None
    loss = W.new_zeros(W.shape[0])

    cols = W.shape[1]
    for i1 in range(0, cols, block):
        i2 = min(i1 + block, cols)
        given = None if mask is None else mask[:, i1:i2]
        drop = _block_drop(W[:, i1:i2], U[i1:i2, i1:i2].diagonal(), sparsity, nm, given)
        Q1, Err1 = _block_sweep(W, U, slice(i1, i2), drop, nm, grids, stale, codes, loss)
        W[:, i1:i2] = Q1
        keep[:, i1:i2] = ~drop
        W[:, i2:] -= Err1.matmul(U[i1:i2, i2:])

    scales, zeros = grids.stacked()
    if perm is not None:
        back = torch.argsort(perm)
        W, keep = W[:, back], keep[:, back]
        codes = None if codes is None else codes[:, back]
    return Result(W, keep, codes, scales, zeros, loss, perm)


def _block_drop(W1: Tensor, d1: Tensor, sparsity: float, nm, given: Tensor | None) -> Tensor:
    """What a block loses, as known on entry: bool [rows, block]; N:M is chosen on the way."""
    if given is not None:
        return ~given
    if nm is not None or sparsity == 0:
        return torch.zeros_like(W1, dtype=torch.bool)
    score = W1**2 / d1.reshape(1, -1) ** 2
    threshold = torch.sort(score.flatten())[0][int(score.numel() * sparsity)]
    return score <= threshold


def _block_sweep(W, U, b: slice, drop, nm, grids: _Grids, stale: bool, codes, loss):
    """The columns b of W one after the other: (Q1, Err1). Writes drop (N:M), codes and loss."""
    W1, U1, i1 = W[:, b].clone(), U[b, b], b.start
    d1 = U1.diagonal()
    Q1, Err1 = torch.zeros_like(W1), torch.zeros_like(W1)
    for j in range(W1.shape[1]):
        if nm is not None and j % nm[1] == 0:
            score = W1[:, j : j + nm[1]] ** 2 / d1[j : j + nm[1]].reshape(1, -1) ** 2
            least = torch.topk(score, nm[1] - nm[0], dim=1, largest=False)[1]
            drop.scatter_(1, j + least, True)
        w, d = W1[:, j], d1[j]
        q = w.clone()
        q[drop[:, j]] = 0
        if grids.bits:
            ahead = slice(i1 + j, i1 + j + grids.group)
            grids.enter(i1 + j, W[:, ahead] if stale else _current(W, W1, Err1, U, i1, j, ahead))
            q, code = grids.round(i1 + j, q)
            codes[:, i1 + j] = code.to(torch.uint8)
        Q1[:, j] = q
        loss += (w - q) ** 2 / d**2 / 2
        e = (w - q) / d
        W1[:, j:] -= e.unsqueeze(1).matmul(U1[j, j:].unsqueeze(0))
        Err1[:, j] = e
    return Q1, Err1


def _current(W: Tensor, W1: Tensor, Err1: Tensor, U: Tensor, i1: int, j: int, ahead: slice):
    """The weights of a group with every update made so far, also where it leaves the block."""
    i2 = i1 + W1.shape[1]
    inside = W1[:, j : ahead.stop - i1]
    outside = W[:, i2 : ahead.stop] - Err1[:, :j].matmul(U[i1 : i1 + j, i2 : ahead.stop])
    return torch.cat([inside, outside], dim=1)


def gptq(W: Tensor, H: Tensor, bits: int, **options) -> Result:
    """GPTQ: quantise every weight, no pruning. Options as in sweep (group, order, static ...)."""
    return sweep(W, H, bits=bits, **options)


def rtn(W: Tensor, bits: int, group: int = 0, symmetric: bool = False, mse: bool = False) -> Result:
    """Round to nearest on the same grids, no Hessian. loss is left at zero."""
    W = W.float()
    parts = []
    for part in W.split(group or W.shape[1], dim=1):
        scale, zero = grid(part, bits, symmetric, mse)
        value, code = round_to(part, scale, zero, bits)
        parts.append((value, code.to(torch.uint8), scale, zero))
    value, code, scale, zero = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    keep = torch.ones_like(W, dtype=torch.bool)
    return Result(value, keep, code, scale, zero, W.new_zeros(W.shape[0]))
