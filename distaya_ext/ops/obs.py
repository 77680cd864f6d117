"""One blocked OBS sweep that prunes (SparseGPT), rounds (GPTQ) or does both in the same pass.

Given H' = R R^T (R upper, ``ops.cholesky``), the sweep runs left to right over the columns of W
and lets the weights still to come make up for what was pruned or rounded, without an inverse of H:

    M = R / diag(R), D = diag(R)^2, E = W0 - Q, N = M[b, b]^-1 per block b of 128 columns
    T = W0[:, b] + E[:, :b] M[:b, b] N
    per column g = w - q, cost 1/2 g^2 D_j, T[:, j:] -= g N[j, j:]

Sources: SparseGPT (Frantar & Alistarh 2023, algorithm 1), GPTQ (Frantar et al. 2022, algorithm
1), QuIP (Chee et al. 2023, section 3: the feedback form). See csrc/obs/obs.h for every rule.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from distaya_ext import _C
from distaya_ext._op import op
from distaya_ext.errors import InputError
from distaya_ext.finite import need_finite
from distaya_ext.ops.among import Among
from distaya_ext.ops.order import check_order, permutation
from distaya_ext.quant import Quant

if TYPE_CHECKING:
    from distaya_ext.ops.cholesky import LateFactor


class Swept(NamedTuple):
    """What ``sweep_`` returns beside the W it changed; see ``ObsResult``."""

    mask: Tensor | None
    codes: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    loss: Tensor


class ObsResult(NamedTuple):
    """A compressed matrix.

    W       [rows, cols]    in the dtype of the input
    mask    [rows, cols]    bool, True = kept (all True when only rounding)
    codes   [rows, cols]    uint8 or None; W = scale * (code - zero) before rounding to W's dtype
    scales  [rows, groups]  float32 or None
    zeros   [rows, groups]  float32 (whole numbers) or None
    loss    [rows]          float64, 1/2 (Q - W) H' (Q - W)^T, H' = the damped H, Q in float32
    perm    [cols]          int64 order of the sweep over the columns, None = the natural one.
                            W, mask and codes are in the ORIGINAL order. With dynamic groups,
                            group g covers columns perm[g * group : (g + 1) * group]; static
                            groups and whole rows keep the original order.
    floored                 pivots that had to be lifted to factorise H (``cholesky``): H was
                            singular even when damped, and H' differs from it in those columns
    """

    W: Tensor
    mask: Tensor
    codes: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    loss: Tensor
    perm: Tensor | None
    floored: int


@op(mutates=("W", "mask", "codes", "scales", "zeros", "loss"))
def obs_(
    W: Tensor,
    R: Tensor,
    mask: Tensor | None,
    codes: Tensor | None,
    scales: Tensor | None,
    zeros: Tensor | None,
    group_of: Tensor | None,
    loss: Tensor,
    select: str,
    sparsity: float,
    reference: bool,
    n: int,
    m: int,
    bits: int,
    group: int,
    symmetric: bool,
    mse: bool,
    scale_dtype: str,
    dynamic: bool,
) -> None:
    """The raw sweep on outputs that are already allocated (csrc/obs/obs.h)."""
    tensors = (W, R, mask, codes, scales, zeros, group_of, loss)
    grid = (bits, group, symmetric, mse, scale_dtype)
    _sweep(tensors, (select, sparsity, reference, n, m), grid, dynamic)


def _sweep(tensors: tuple, how: tuple, grid: tuple, dynamic: bool, *among: object) -> None:
    W = tensors[0]
    options = _C.ObsOptions(*how, _C.GridOptions(*grid), dynamic)
    work = torch.empty(_C.obs_work(W), dtype=torch.uint8, device=W.device)
    _C.obs(*tensors, work, options, *among)


@op(mutates=("W", "codes", "scales", "zeros"))
def quantize_(
    W: Tensor,
    codes: Tensor | None,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    group: int,
    symmetric: bool,
    mse: bool,
    scale_dtype: str,
) -> None:
    """Raw grids of W and, when codes is given, round to nearest in place."""
    options = _C.GridOptions(bits, group, symmetric, mse, scale_dtype)
    _C.quantize(W, codes, scales, zeros, options)


def _empty_grids(W: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
    groups = -(-W.shape[1] // quant.width(W.shape[1]))
    scales = W.new_empty(W.shape[0], groups, dtype=torch.float32)
    return scales, torch.empty_like(scales)


def grids(W: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
    """Scales and zeros, each float32 [rows, groups], of the weights W [rows, cols] as they are."""
    scales, zeros = _empty_grids(W, quant)
    quantize_(W, None, scales, zeros, *quant.options(W.shape[1]))
    return scales, zeros


def quantize(W: Tensor, quant: Quant) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round to nearest (RTN): W [rows, cols] -> (Wq of W's dtype, codes, scales, zeros).

    Zeros in W stay exactly 0. Raises ValueError for a wrong dtype or shape.
    """
    Wq = W.clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(Wq, dtype=torch.uint8)
    scales, zeros = _empty_grids(W, quant)
    quantize_(Wq, codes, scales, zeros, *quant.options(W.shape[1]))
    return Wq, codes, scales, zeros


def _selection(sparsity, nm, mask, quant) -> str:
    asked = {"sparsity": bool(sparsity), "nm": nm is not None, "mask": mask is not None}
    if sum(asked.values()) > 1:
        names = " and ".join(name for name, given in asked.items() if given)
        raise InputError(f"{names} were given, but a sweep takes its mask from one of them")
    if asked["nm"] or asked["mask"]:
        return "nm" if asked["nm"] else "given"
    nothing_else = sparsity is not None and quant is None  # then 0 % is a (void) request of its own
    return "unstructured" if sparsity or nothing_else else "none"


def sweep_(
    W: Tensor,
    R: Tensor,
    *,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    quant: Quant | None = None,
    reference: bool = False,
    given_grids: tuple[Tensor, Tensor] | None = None,
    group_of: Tensor | None = None,
    among: Among | None = None,
) -> Swept:
    """Sweep W [rows, cols] (float32, bfloat16 or float16; contiguous; CHANGED in place).

    R        [cols, cols] float32, upper, H' = R R^T; everything is on one device
    sparsity 0 <= s < 1: exactly floor(rows * cols * s) weights go, with one threshold per block of
             128 columns over all rows; equal scores go in row-major order
    nm       (n, m): n kept of every m <= 32 inputs of a row (a shorter last group keeps at most n)
    mask     bool [rows, cols], True = kept
    quant    grids; with any of the above, the kept weights are rounded in the same pass
    reference  as published: unstructured counts (per block floor(size * s) + 1 and all ties), and
             dynamic grids from the weights on entry to their block of 128 columns
    given_grids, group_of  scales and zeros [rows, groups] to use instead of grids(W) when the grids
             are not dynamic, and int64 [cols], the group of each column
    among    W holds this rank's rows of a matrix that lies on several: every rank calls this, and
             gets exactly its rows of what one process would give for all of them. Only `sparsity`
             exchanges anything: 32768 bytes per rank and block of 128 columns

    Nothing is synchronised with the GPU, and NaN is not looked for: ``obs`` does that. Raises
    ValueError for shapes, dtypes, devices and options that do not fit.
    """
    select = _selection(sparsity, nm, mask, quant)
    if among is not None:
        among.check(W.shape[0])
    codes = scales = zeros = None
    options: tuple[int, int, bool, bool, str] = (0, 0, False, False, "float32")
    if quant is not None:
        codes = torch.empty_like(W, dtype=torch.uint8)
        options = quant.options(W.shape[-1])
        if quant.dynamic():
            scales, zeros = _empty_grids(W, quant)
        else:
            scales, zeros = given_grids or grids(W, quant)
    if mask is None and select != "none":
        mask = torch.empty_like(W, dtype=torch.bool)
    loss = W.new_zeros(W.shape[0], dtype=torch.float64)
    dynamic = quant is not None and quant.dynamic()
    tensors = (W, R, mask, codes, scales, zeros, group_of, loss)
    how = (select, float(sparsity or 0), reference, *(nm or (0, 0)))
    if among is None or len(among.rows) == 1:
        obs_(*tensors, *how, *options, dynamic)
    else:  # not a torch op: it calls back
        _sweep(tensors, how, options, dynamic, *among.tables(_C.obs_table, W.device))
    return Swept(mask, codes, scales, zeros, loss)


def _check(W: Tensor, H: Tensor | None, factor: object) -> None:
    if W.dim() != 2:
        raise InputError(f"W must be [rows, cols] but has shape {list(W.shape)}")
    if (H is None) == (factor is None):
        raise InputError("obs takes either H or factor=cholesky(H), one of them")
    if H is not None and H.shape != (W.shape[1], W.shape[1]):
        raise InputError(
            f"H of shape {list(H.shape)} does not fit W of {W.shape[1]} columns (inputs)"
        )


def obs(
    W: Tensor,
    H: Tensor | None = None,
    *,
    factor=None,
    sparsity: float | None = None,
    nm: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    quant: Quant | None = None,
    order: str | Tensor = "natural",
    damp: float = 0.01,
    reference: bool = False,
    overwrite_H: bool = False,
    later: Callable[["LateFactor"], None] | None = None,
    among: Among | None = None,
) -> ObsResult:
    """Compress W [rows, cols] (not modified) for inputs with second moments H. See ``sweep_``.

    H        float32 [cols, cols] symmetric (``Hessian.finish()``), or factor=cholesky(H)
    order    "activation" sweeps columns by descending diagonal of H (GPTQ's act-order), "group"
             whole N:M groups and "block" blocks and their columns by what pruning is expected to
             cost there (ops.order); or an int64 [cols] permutation such as the perm of a result,
             which must leave N:M groups whole. The result comes back in the original order
    damp     share of the mean diagonal added to it (ignored with factor=)
    reference  the published conventions: SparseGPT's counts, GPTQ's group grids from the weights on
             entry to the block, and columns whose input never fired (H_jj = 0) get a unit diagonal
             and zero weights
    overwrite_H  H may be destroyed, which saves a copy of it
    later    is given the factor of H while it is only queued. Then nothing here waits for the
             device (but with reference=True, which looks for dead columns): W is not searched for
             NaN, see finite.need_finite, and `floored` is -1, see the factor
    among    W is this rank's rows of a matrix (see ``sweep_``), H is that of all ranks; an order
             that looks at W must come as the permutation of the whole matrix

    Raises ValueError (InputError) with one sentence for bad shapes, NaN or nothing to do.
    """
    from distaya_ext.ops.cholesky import cholesky_late  # lazily: a sweep from R needs none

    _check(W, H, factor)
    check_order(order, W, H, nm, sparsity, wait=later is None, among=among)
    if later is None:
        need_finite(W)
    W0, W = W, W.clone(memory_format=torch.contiguous_format)
    group_of = given = None
    if quant is not None and not quant.group:
        given = grids(W, quant)  # published: whole-row grids precede everything else
    if H is not None and reference and (dead := H.diagonal() == 0).any():
        H = H.clone()
        H.diagonal()[dead] = 1
        W[:, dead] = 0
    if quant is not None and quant.group and quant.static:
        given = grids(W, quant)
    if (perm := permutation(order, W, H, nm, sparsity)) is not None:
        W, H = W[:, perm].contiguous(), H[perm][:, perm].contiguous()
        mask = None if mask is None else mask[:, perm]
        if given is not None and quant.group:
            group_of = perm // quant.group
    if factor is None:
        # A permuted H is a copy already.
        factor = cholesky_late(H, damp, overwrite=overwrite_H or perm is not None)
        if later is None:
            factor = factor.read()
        else:
            later(factor)
    mask = None if mask is None else mask.contiguous()
    s = sweep_(W, factor.R, sparsity=sparsity, nm=nm, mask=mask, quant=quant,
               reference=reference, given_grids=given, group_of=group_of, among=among)  # fmt: skip
    kept = s.mask if s.mask is not None else torch.ones_like(W0, dtype=torch.bool)
    codes = s.codes
    if perm is not None:
        back = torch.argsort(perm)
        W, kept = W[:, back], kept[:, back]
        codes = None if codes is None else codes[:, back]
    floored = factor.floored if later is None else -1
    return ObsResult(W, kept, codes, s.scales, s.zeros, s.loss, perm, floored)


class Reference(NamedTuple):
    """``reference``'s result in float64; clear [rows]: no decision of that row hangs by 1e-5."""

    W: Tensor
    mask: Tensor
    codes: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    loss: Tensor
    clear: Tensor


def reference(
    W: Tensor,
    H: Tensor,
    *,
    sparsity: float = 0.0,
    nm: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    quant: Quant | None = None,
    reference: bool = False,
) -> Reference:
    """The textbook sweep in float64 (Cholesky, inverse, Cholesky; one column at a time).

    W [rows, cols]; H [cols, cols] already damped. Same rules as ``sweep_``; slow, for tests.
    """
    dense, W = W.double(), W.double().clone()
    U = torch.linalg.cholesky(H.double())
    U = torch.linalg.cholesky(torch.cholesky_inverse(U), upper=True)
    rows, cols = W.shape
    keep = torch.ones_like(W, dtype=torch.bool) if mask is None else mask.clone()
    clear, loss = torch.ones(rows, dtype=torch.bool), W.new_zeros(rows)
    codes = torch.zeros(rows, cols, dtype=torch.uint8) if quant else None
    placed: list[tuple[Tensor, Tensor]] = []
    width, entry = quant.width(cols) if quant else cols, W
    for j in range(cols):
        ahead = torch.arange(j, min(cols, j + 128))
        entry = W.clone() if j % 128 == 0 else entry
        score = W[:, ahead] ** 2 / U.diagonal()[ahead] ** 2
        if sparsity and j % 128 == 0:
            count = int(rows * (j + len(ahead)) * sparsity) - int(rows * j * sparsity)
            count = int(score.numel() * sparsity) + 1 if reference else count
            keep[:, ahead], sure = _keep_but(score.reshape(1, -1), count, rows)
            clear &= sure
        elif nm and j % nm[1] == 0:
            group = score[:, : nm[1]]
            drop = max(0, group.shape[1] - nm[0])
            keep[:, ahead[: nm[1]]], sure = _keep_but(group, drop, rows)
            clear &= sure
        q = W[:, j] * keep[:, j]
        if quant:
            if j % width == 0:
                now = (entry if reference else W) if quant.dynamic() else dense
                *grid, sure = quant.grid(now[:, j : j + width])
                placed.append((grid[0], grid[1]))
                clear &= sure
            scale, zero = placed[-1]
            code = quant.code(q, scale, zero)
            for nudge in (1 - 1e-5, 1 + 1e-5):
                clear &= quant.code(q * nudge, scale, zero) == code
            codes[:, j] = code.to(torch.uint8)
            q = scale * (code - zero)
        error = (W[:, j] - q) / U[j, j]
        loss += error**2 / 2
        W[:, j:] -= error[:, None] * U[j, j:]
        W[:, j] = q
    scales, zeros = (torch.stack(x, 1) for x in zip(*placed, strict=True)) if quant else (None,) * 2
    return Reference(W, keep, codes, scales, zeros, loss, clear)


def _keep_but(score: Tensor, drop: int, rows: int) -> tuple[Tensor, Tensor]:
    """Mask of all but the ``drop`` least of each row of score, and whether that was clear."""
    value, order = score.sort(dim=1, stable=True)
    keep = torch.ones_like(score, dtype=torch.bool).scatter_(1, order[:, :drop], False)
    sure = torch.ones(len(score), dtype=torch.bool)
    if 0 < drop < score.shape[1]:
        sure = value[:, drop - 1] < value[:, drop] * (1 - 1e-5)
    return keep.reshape(rows, -1), sure.expand(rows)
