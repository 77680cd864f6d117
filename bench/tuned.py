"""The inverse-free route in PyTorch, tuned as far as public torch CPU operators go: the 2nd ruler.

With H = R R^T, R upper (one Cholesky of the reversed matrix), U = R^-1 is the textbook's factor
of H^-1, so a sweep needs only R and the inverses of its diagonal blocks:

    G = E[:, done] R[done, :]                  E = W0 - Q, the deviation from the dense weights
    W1 = W0[:, b] + G[:, b] U_bb               the textbook's updated block, from the dense weights
    in-block sweep with N_bb = U_bb / diag     G[:, later] += E[:, b] R[b, later]

What was tuned: one factorisation without an inverse, kthvalue instead of a sort, all buffers
transposed so that a column of W is contiguous and a rank-1 update streams, sub-blocks of 32 inside
a block with one addmm_ for the rest, selection of 2:4 by a min/max network, no division and no
allocation in the column loop. The arithmetic is fp32 (dtype is W's own for float64 checks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.textbook import Result, fix_dead, grid

BLOCK, SUB = 128, 32


def hessian_(H: Tensor, X: Tensor, panel: int = 512) -> None:
    """H [C, C] upper triangle += X^T X for X [T, C]: fp32 GEMMs on the upper block panels only."""
    X = X.to(H.dtype)
    for i in range(0, H.shape[0], panel):
        rows = slice(i, i + panel)
        H[rows, i:].addmm_(X[:, rows].t(), X[:, i:])


def factor(H: Tensor, damp: float = 0.01) -> Tensor:
    """R upper with H + damp * mean(diag H) * I = R R^T; H [C, C] symmetric, not modified."""
    reversed_ = H.flip(0, 1)
    reversed_.diagonal().add_(damp * H.diagonal().mean())
    return torch.linalg.cholesky(reversed_).flip(0, 1)


def block_inverses(R: Tensor) -> list[Tensor]:
    """U_bb = R_bb^-1 for every BLOCK x BLOCK diagonal block (the last one may be smaller)."""
    whole = R.shape[0] // BLOCK
    inverses: list[Tensor] = []
    if whole:
        stack = torch.stack([R[i : i + BLOCK, i : i + BLOCK] for i in _starts(whole * BLOCK)])
        eye = torch.eye(BLOCK, dtype=R.dtype).expand_as(stack)
        inverses += torch.linalg.solve_triangular(stack, eye, upper=True).unbind()
    rest = R[whole * BLOCK :, whole * BLOCK :]
    if rest.shape[0]:
        eye = torch.eye(rest.shape[0], dtype=R.dtype)
        inverses.append(torch.linalg.solve_triangular(rest, eye, upper=True))
    return inverses


def _starts(n: int) -> range:
    return range(0, n, BLOCK)


def sweep(
    W: Tensor,
    H: Tensor | None = None,
    *,
    R: Tensor | None = None,
    sparsity: float = 0.0,
    nm: tuple[int, int] | None = None,
    bits: int = 0,
    group: int = 0,
    symmetric: bool = False,
    damp: float = 0.01,
) -> Result:
    """The same problem as textbook.sweep(stale=False) in natural order; W, H, R not modified.

    W [rows, cols] float32 or float64; H as in the textbook or R = factor(H). group is 0 (one grid
    per row) or a multiple of 32 that divides 128. The same counts as published (floor(n s) + 1).
    """
    if group and (BLOCK % group or group % SUB):
        raise ValueError(f"group must be 0, 32, 64 or 128, not {group}")
    dense = W
    if R is None:
        H, W = H.clone(), W.clone()
        fix_dead(W, H)
        R = factor(H, damp)
    rows, cols = W.shape
    fixed = grid(dense, bits, symmetric) if bits and not group else None
    # one strip = rows of the transposed problem; everything below is [columns, rows]
    G = torch.zeros(cols, rows, dtype=W.dtype)
    out = torch.empty(rows, cols, dtype=W.dtype)
    keep = torch.ones(rows, cols, dtype=torch.bool)
    codes = torch.empty(rows, cols, dtype=torch.uint8) if bits else None
    loss = torch.zeros(rows, dtype=W.dtype)
    grids: list[tuple[Tensor, Tensor]] = [fixed] if fixed else []
    for i1, U in zip(_starts(cols), block_inverses(R), strict=True):
        b = slice(i1, min(i1 + BLOCK, cols))
        W0 = W[:, b].t().contiguous()
        W1 = torch.addmm(W0, U.t(), G[b])
        block = _Block(W1, U, nm, bits, group, symmetric, fixed)
        if nm is None and sparsity > 0:
            block.threshold(sparsity)
        block.run()
        Q = block.finish()
        out[:, b] = Q.t()
        if block.drop is not None:
            keep[:, b] = (block.drop == 0).t()
        if bits:
            codes[:, b] = block.codes.t()
        grids += block.grids
        loss += (block.g * block.g).mul_(block.weight).sum(0).mul_(0.5)
        if b.stop < cols:
            E = W0.sub_(Q)
            G[b.stop :].addmm_(R[b, b.stop :].t(), E)
    scales, zeros = (torch.cat(p, 1) for p in zip(*grids, strict=True)) if bits else (None, None)
    return Result(out, keep, codes, scales, zeros, loss)


class _Block:
    """The column loop of one block, on transposed [columns, rows] tensors."""

    def __init__(self, W1, U, nm, bits, group, symmetric, fixed):
        self.W1, self.nm, self.bits = W1, nm, bits
        self.group, self.symmetric = group, symmetric
        diagonal = U.diagonal()
        self.N = U / diagonal.unsqueeze(1)  # unit upper: no division in the loop
        self.weight = (1 / diagonal.square()).unsqueeze(1)  # cost of a unit error, [columns, 1]
        self.g = torch.empty_like(W1)
        self.drop = None if nm is None else torch.empty_like(W1)  # 1.0 = pruned, 0.0 = kept
        self.codes = torch.empty_like(W1, dtype=torch.uint8) if bits else None
        self.grids: list[tuple[Tensor, Tensor]] = []
        self.scratch = torch.empty_like(W1[0])
        if fixed:
            self.use(fixed)

    def threshold(self, sparsity: float) -> None:
        score = self.W1.square().mul_(self.weight)
        limit = score.view(-1).kthvalue(int(score.numel() * sparsity) + 1)[0]
        self.drop = (score <= limit).to(self.W1.dtype)

    def use(self, scale_zero: tuple[Tensor, Tensor]) -> None:
        self.scale = scale_zero[0][:, 0].contiguous()
        self.zero = scale_zero[1][:, 0].contiguous()
        self.inverse = 1 / self.scale

    def choose(self, j: int) -> None:
        """N:M of columns j..j+m by the current weights."""
        n, m = self.nm
        cols = slice(j, j + m)
        score = self.W1[cols].square().mul_(self.weight[cols])
        if (n, m) == (2, 4) and score.shape[0] == 4:
            high = torch.maximum(score[:2], score[2:])
            low = torch.minimum(score[:2], score[2:])
            limit = torch.maximum(torch.minimum(high[0], high[1]), torch.maximum(low[0], low[1]))
        else:
            limit = score.kthvalue(m - n + 1, dim=0)[0]
        drop = torch.lt(score, limit, out=self.drop[cols])
        if drop.sum() != (m - n) * drop.shape[1]:  # ties somewhere: settle them by index
            order = score.argsort(dim=0, stable=True)
            drop.zero_().scatter_(0, order[: m - n], 1.0)

    def run(self) -> None:
        count = self.W1.shape[0]
        m = self.nm[1] if self.nm else 1
        sub = SUB if SUB % m == 0 else count
        for s in range(0, count, sub):
            e = min(s + sub, count)
            if self.group and s % self.group == 0:
                made = grid(self.W1[s : s + self.group].t(), self.bits, self.symmetric)
                self.grids.append(made)
                self.use(made)
            for j in range(s, e):
                if self.nm and j % m == 0:
                    self.choose(j)
                self.column(j)
                if j + 1 < e:
                    self.W1[j + 1 : e].addr_(self.N[j, j + 1 : e], self.g[j], alpha=-1)
            if e < count:
                self.W1[e:].addmm_(self.N[s:e, e:].t(), self.g[s:e], alpha=-1)

    def column(self, j: int) -> None:
        w, g = self.W1[j], self.g[j]
        if not self.bits:
            if self.drop is None:
                g.zero_()
            else:
                torch.mul(w, self.drop[j], out=g)
            return
        code = torch.mul(w, self.inverse, out=self.scratch)
        code.round_().add_(self.zero).clamp_(0, 2**self.bits - 1)
        if self.drop is not None:
            code.lerp_(self.zero, self.drop[j])  # exact: the weight is 0 or 1
        self.codes[j] = code
        torch.sub(w, code.sub_(self.zero).mul_(self.scale), out=g)

    def finish(self) -> Tensor:
        """Q of the block: a column of W1 is left alone after its visit, so Q = W1 - g there."""
        Q = self.W1 - self.g
        if self.bits:  # rounding of that subtraction would leave the grid: rebuild from codes
            Q = self._from_codes()
        return Q

    def _from_codes(self) -> Tensor:
        Q = self.codes.to(self.W1.dtype)
        if not self.group:
            return Q.sub_(self.zero).mul_(self.scale)
        for k, (scale, zero) in enumerate(self.grids):
            part = Q[k * self.group : (k + 1) * self.group]
            part.sub_(zero.t()).mul_(scale.t())
        return Q
