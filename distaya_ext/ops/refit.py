"""What the kept weights should be once the mask is fixed, and masks chosen together with weights.

With H' = H + damp · mean(diag H) · I and L(Q) = 1/2 (Q - T) H' (Q - T)ᵀ per row:

    refit   least L over Q supported on a mask, by conjugate gradients with the diagonal of H' as
            preconditioner: one product [rows, cols] x [cols, cols] per iteration
    admm    mask and weights together, by the alternating direction method of multipliers on unit
            columns: one such product per iteration, and one inverse per value of rho

Sources: ALPS (Meng et al. 2024) for both, Boža 2024 (2401.02938) for admm on the unit-diagonal Gram
matrix. See csrc/refit/refit.h for every rule and bound.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from distaya_ext import _C
from distaya_ext._op import op
from distaya_ext.errors import InputError, UsageError
from distaya_ext.ops import mask as mask_op
from distaya_ext.ops.among import Among
from distaya_ext.ops.cholesky import cholesky_late, inverse_, inverse_factor_


class Refitted(NamedTuple):
    """W [rows, cols] as ``refit`` returns it; before, after: float64 [rows], L of the start and of
    W (in float32, before it was rounded to its dtype)."""

    W: Tensor
    before: Tensor
    after: Tensor


@op(mutates=("out", "before", "after"))
def refit_(
    target: Tensor,
    mask: Tensor,
    H: Tensor,
    start: Tensor | None,
    damp: float,
    iterations: int,
    out: Tensor,
    before: Tensor,
    after: Tensor,
    all_rows: int = 0,
) -> None:
    """The raw conjugate gradients on outputs that are already allocated (csrc/refit/refit.h)."""
    work = torch.empty(_C.refit_work(out), dtype=torch.uint8, device=out.device)
    _C.refit(target, mask, H, start, damp, iterations, out, before, after, work, all_rows)


@op(mutates=("G", "X"))
def admm_(
    G: Tensor,
    X: Tensor,
    mask: Tensor,
    Y: Tensor,
    inverse: Tensor,
    rho: float,
    ratio: float,
    all_rows: int = 0,
) -> None:
    """One raw iteration (csrc/refit/refit.h): G [rows, cols] becomes the next one, X = |G|."""
    _C.admm(G, X, mask, Y, inverse, rho, ratio, all_rows)


@op(mutates=("C",))
def multiply_(C: Tensor, X: Tensor, B: Tensor, all_rows: int = 0) -> None:
    """C += X B for fp32 C, X [rows, cols] and B [cols, cols], contiguous, C apart from both."""
    _C.multiply(C, X, B, all_rows)


def refitted(
    W: Tensor,
    mask: Tensor,
    H: Tensor,
    *,
    target: Tensor | None = None,
    start: Tensor | None = None,
    damp: float = 0.01,
    iterations: int = 10,
    all_rows: int = 0,
) -> Refitted:
    """``refit``, with L before and after it."""
    out = torch.empty_like(W, memory_format=torch.contiguous_format)
    target = (W if target is None else target).contiguous()
    if start is not None:
        start = start.to(torch.float32).contiguous()
    before = W.new_empty(W.shape[:1], dtype=torch.float64)
    after = torch.empty_like(before)
    refit_(target, mask.contiguous(), H, start, damp, iterations, out, before, after, all_rows)
    return Refitted(out, before, after)


def refit(
    W: Tensor,
    mask: Tensor,
    H: Tensor,
    *,
    target: Tensor | None = None,
    start: Tensor | None = None,
    damp: float = 0.01,
    iterations: int = 10,
    all_rows: int = 0,
) -> Tensor:
    """The kept weights that make up best for the pruned ones: least L(Q), Q supported on mask.

    W        [rows, cols] float32, bfloat16 or float16; the result has its dtype
    mask     bool [rows, cols], True = kept; the result is 0 elsewhere
    H        float32 [cols, cols] symmetric (``Hessian.finish()``), not damped
    target   what T is, if not W: [rows, cols], any of the three dtypes
    start    where to begin, if not at T itself (what is off the mask is ignored): [rows, cols]
    damp     share of the mean diagonal that is added to it; 1 if no column is alive
    iterations  products with H; 10 come within a few per cent of the optimum, 0 only prunes
    all_rows of the matrix, if these are some of its rows: on CUDA their bits are those of the whole

    In float32 L falls with every iteration: a row ends early where rounding would decide the sign
    of a gain. In 16 bits the result is what float32 gives, rounded. Nothing waits for the device,
    and NaN is not looked for: it spreads over its row. Raises ValueError for shapes, dtypes,
    devices and options that do not fit.
    """
    return refitted(W, mask, H, target=target, start=start, damp=damp, iterations=iterations,
                    all_rows=all_rows).W  # fmt: skip


def _schedule(rho: tuple[float, float], iterations: int, levels: int) -> list[tuple[float, int]]:
    """(rho, iterations with it): geometric from the first to the last, earlier ones longer."""
    first, last = rho
    if not (0 < first <= last < math.inf):
        raise UsageError(f"rho must rise from a number > 0 to a finite one, not {first} to {last}")
    if iterations < 0:
        raise UsageError(f"iterations must be at least 0, not {iterations}")
    if levels < 1:
        raise UsageError(f"levels must be at least 1, not {levels}")
    levels = min(levels, iterations)
    steps = [iterations // levels + (i < iterations % levels) for i in range(levels)]
    ratio = (last / first) ** (1 / max(1, levels - 1))
    return [(first * ratio**i, n) for i, n in enumerate(steps)]


def _selection(shape: torch.Size, sparsity: float | None, nm, along: str, among=None):
    """The projection: scores [rows, cols] -> mask. Exact counts, ties as in ops.mask."""
    if (sparsity is None) == (nm is None):
        raise InputError("admm takes either sparsity or nm, one of them")
    if nm is not None:
        return lambda scores: mask_op.mask_keep_nm(scores, *nm, "inputs")[0]
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity must be at least 0 and below 1, not {sparsity}")
    if along not in ("matrix", "row"):
        raise InputError(f"along must be 'matrix' or 'row', not {along!r}")
    rows = shape[0] if among is None else among.total
    size = shape[1] if along == "row" else rows * shape[1]
    count = size - int(size * sparsity)
    if along == "matrix" and among is not None:
        return lambda scores: mask_op.mask_keep_k_among(scores, count, among)[0]
    return lambda scores: mask_op.mask_keep_k(scores, count, along)[0]


def unit_columns(H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """H = d A d with ones on A's diagonal: (A [n, n], d [n], 1 / d [n]); a dead column (H_jj <= 0)
    has d = 1 / d = 0, so that its weights are the first to go."""
    d = H.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(d > 0, 1 / d, 0.0)
    A = (H.contiguous() * inverse).mul_(inverse[:, None])
    A.diagonal().fill_(1.0)
    return A, d, inverse


def admm(
    T: Tensor,
    H: Tensor,
    *,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    along: str = "matrix",
    damp: float = 0.01,
    iterations: int = 30,
    rho: tuple[float, float] = (0.03, 3.0),
    levels: int = 6,
    start: Tensor | None = None,
    among: Among | None = None,
) -> tuple[Tensor, Tensor]:
    """Sparse weights D close to T in the outputs they give, and their mask: (D, mask).

    T        [rows, cols] float32, bfloat16 or float16; D has its dtype
    H        float32 [cols, cols] symmetric (``Hessian.finish()``), not damped
    sparsity 0 <= s < 1: exactly floor(size * s) weights go, of the matrix or of each row (`along`)
    nm       (n, m): n kept of every m inputs; m divides cols
    damp     added to the Gram matrix of unit columns, whose diagonal is 1
    rho      first and last of `levels` values in geometric steps, each with one inverse (2 cols³
             flop, an iteration has 2 rows cols²). With (0.1, 1.0) it chooses better masks on the
             layers of small language models than with the default, and with 10 levels again
    start    weights to begin with [rows, cols] (their largest count as kept), if not T itself
    among    T holds this rank's rows of a matrix that lies on several, H is the same on all: each
             gets exactly its rows of what one process would give. Only `sparsity` of the matrix
             exchanges anything: 8224 bytes per rank and iteration, and once before them

    D is the last projection: ``refit(T, mask, H, start=D)`` improves on it. Nothing waits for the
    device, and NaN is not looked for. Raises ValueError for shapes, dtypes and options that do not
    fit.
    """
    if T.dim() != 2 or H.shape != (T.shape[1], T.shape[1]):
        raise InputError(f"H of shape {list(H.shape)} does not fit T of shape {list(T.shape)}")
    if start is not None and start.shape != T.shape:
        raise InputError(f"start of {list(start.shape)} does not fit T of {list(T.shape)}")
    if not (math.isfinite(damp) and damp >= 0):
        raise UsageError(f"damp must be a finite number >= 0 but is {damp}")
    all_rows = 0
    if among is not None:
        among.check(T.shape[0])
        all_rows = among.total
    project = _selection(T.shape, sparsity, nm, along, among)
    schedule = _schedule(rho, iterations, levels)
    A, d, inverse_d = unit_columns(H)
    X = (T.float() * d).contiguous()
    Y = damp * X
    multiply_(Y, X, A, all_rows)
    G = X.clone() if start is None else (start.float() * d).contiguous()
    mask = project(G.abs())
    before = 0.0
    for now, steps in schedule:
        factor = cholesky_late(A, damp + now)
        U = torch.empty_like(A)
        inverse_factor_(factor.R, U)
        inverse_(U, factor.R)  # in the factor's memory, which is not needed any more
        for _ in range(steps):
            admm_(G, X, mask, Y, factor.R, now, before / now, all_rows)
            mask = project(X)
            before = now
    D = torch.where(mask, G.mul_(inverse_d), 0.0)
    return D.to(T.dtype), mask


def reference(
    T: Tensor,
    mask: Tensor,
    H: Tensor,
    *,
    start: Tensor | None = None,
    damp: float = 0.01,
    iterations: int = 10,
) -> tuple[Tensor, Tensor]:
    """Conjugate gradients in float64 as in a textbook: Q, and per row the path sum |a p|_D."""
    A = damped(H, damp)
    T, D = T.double(), A.diagonal()
    inverse = torch.where(D > 0, 1 / D, 0.0)
    Q = (T if start is None else start.double()) * mask
    r = ((T - Q) @ A) * mask
    p = z = r * inverse
    rz = (r * z).sum(1, keepdim=True)
    path = T.new_zeros(len(T))
    for _ in range(iterations):
        y = p @ A
        py = (p * y).sum(1, keepdim=True)
        a = torch.where((rz > 0) & (py > 0), rz / py, 0.0)
        Q, r = Q + a * p, r - a * y * mask
        path += ((a * p) ** 2 * D).sum(1).sqrt()
        z = r * inverse
        after = (r * z).sum(1, keepdim=True)
        p = z + torch.where(rz > 0, after / rz, 0.0) * p
        rz = after
    return Q, path


def damped(H: Tensor, damp: float) -> Tensor:
    """H' in float64."""
    H = H.double()
    mean = H.diagonal().mean()
    return H + damp * torch.where(mean > 0, mean, 1.0) * torch.eye(len(H), dtype=H.dtype)


def backsolve(T: Tensor, mask: Tensor, H: Tensor, damp: float = 0.01) -> Tensor:
    """The optimum of ``refit`` in float64, row by row: q_S = (T H')_S (H'_SS)⁻¹."""
    A, T = damped(H, damp), T.double()
    B = T @ A
    Q = torch.zeros_like(T)
    for q, b, keep in zip(Q, B, mask, strict=True):
        kept = keep.nonzero()[:, 0]
        q[kept] = torch.linalg.solve(A[kept][:, kept], b[kept])
    return Q


def reference_admm(
    T: Tensor,
    H: Tensor,
    *,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    along: str = "matrix",
    damp: float = 0.01,
    iterations: int = 30,
    rho: tuple[float, float] = (0.03, 3.0),
    levels: int = 6,
) -> tuple[Tensor, Tensor]:
    """``admm`` in float64 with weights B, D and dual V apart, as published: (D, mask)."""
    project = _selection(T.shape, sparsity, nm, along)
    A, d, inverse_d = (x.double() for x in unit_columns(H.double()))
    eye = torch.eye(len(A), dtype=A.dtype)
    A = A + damp * eye
    X = T.double() * d
    Y, V = X @ A, torch.zeros_like(X)
    mask = project(X.float().abs())
    D = X * mask
    for now, steps in _schedule(rho, iterations, levels):
        inverse = torch.linalg.inv(A + now * eye)
        for _ in range(steps):
            B = (Y - V + now * D) @ inverse
            G = B + V / now
            mask = project(G.float().abs())
            D = G * mask
            V = V + now * (B - D)
    return D * inverse_d, mask
