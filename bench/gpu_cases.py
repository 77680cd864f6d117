"""What bench/gpu.py times: every op of the rooms at Aya-8B's shapes, each beside torch's way.

A case is built on the device right before it is measured and dropped right after. `work` counts
what cannot be avoided, per ceiling: GFLOP under "bf16" or "fp32", GB read and written once under
"copy". `difference(ours, first ruler)` of the first call must not exceed `limit`: a fast wrong
kernel is no result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import gpu_influence, gpu_packed, gpu_products, gpu_refine, shapes, textbook, tuned
from bench.cases import MODES, our_options
from bench.gpu_case import Case, Size, disagreement, relative, rotated

# ---- hessian ----


def hessian(columns: int, s: Size) -> Case:
    from distaya_ext.ops.hessian import hessian_

    H, book = (torch.zeros(columns, columns, device=s.device) for _ in range(2))

    def ours(X: Tensor) -> Tensor:
        hessian_(H, X)
        return H

    def widened(X: Tensor) -> Tensor:
        x = X.float()
        return book.addmm_(x.t(), x)

    rulers = {"mm fp32": widened}
    if s.device == "cuda":  # the tensor cores' way, exact products summed in fp32
        rulers["mm bf16 to fp32"] = lambda X: torch.mm(X.t(), X, out_dtype=torch.float32)
    X = shapes.activations(s.tokens, columns, device=s.device)
    work = {
        "bf16": columns * (columns + 1) * s.tokens / 1e9,
        "copy": (X.nbytes + H.nbytes) / 1e9,  # half of H read, half written
    }
    return Case(
        ours, rulers, rotated(X), work, lambda a, b: relative(a.triu(), b.triu()), limit=1e-4
    )


def column_sq(columns: int, s: Size) -> Case:
    from distaya_ext.ops.hessian import column_sq_

    sums, book = (torch.zeros(columns, device=s.device) for _ in range(2))

    def ours(X: Tensor) -> Tensor:
        column_sq_(sums, X)
        return sums

    X = shapes.activations(s.tokens, columns, device=s.device)
    rulers = {"float, square, sum": lambda X: book.add_(X.float().square().sum(0))}
    return Case(ours, rulers, rotated(X), {"copy": X.nbytes / 1e9}, relative, limit=1e-4)


def symmetrize(columns: int, s: Size) -> Case:
    from distaya_ext.ops.hessian import symmetrize_

    def ours(H: Tensor) -> Tensor:
        symmetrize_(H)
        return H

    def book(H: Tensor) -> Tensor:
        return H.triu() + H.triu(1).t()

    H = shapes.weights(columns, columns, device=s.device)
    truth = book(H)  # beforehand: ours works in place
    return Case(
        ours,
        {"triu + triu^T": book},
        rotated(H),
        {"copy": H.nbytes / 1e9},
        lambda a, _book: relative(a, truth),
        limit=0.0,
    )


# ---- cholesky ----


def factor(n: int, s: Size) -> Case:
    """R of ours; the textbook's three steps end in its inverse. Judged by ||R R^T - H'||."""
    from distaya_ext.ops import cholesky

    H = shapes.hessian(n, s.tokens, device=s.device)

    damped = H.clone()
    damped.diagonal().add_(0.01 * H.diagonal().mean())

    def residual(R: Tensor, _book: object) -> float:
        return relative(R @ R.t(), damped)

    rulers = {
        "chol, inverse, chol": textbook.factor,
        "flipped chol": tuned.factor,
        "cusolver": lambda _H: torch.linalg.cholesky(damped),  # the factorisation alone
    }
    return Case(
        lambda H: cholesky.cholesky(H).R,
        rulers,
        rotated(H),
        {"fp32": n**3 / 3 / 1e9, "copy": 2 * H.nbytes / 1e9},
        residual,
        limit=1e-4,
    )


def inverse_factor(n: int, s: Size) -> Case:
    from distaya_ext.ops import cholesky

    R = cholesky.cholesky(shapes.hessian(n, s.tokens, device=s.device), overwrite=True).R
    eye = torch.eye(n, device=s.device)
    rulers = {"solve_triangular": lambda R: torch.linalg.solve_triangular(R, eye, upper=True)}
    work = {"fp32": n**3 / 3 / 1e9, "copy": R.nbytes / 1e9}
    return Case(cholesky.inverse_factor, rulers, rotated(R), work, relative, limit=1e-2)


def inverse(n: int, s: Size) -> Case:
    from distaya_ext.ops import cholesky

    R = cholesky.cholesky(shapes.hessian(n, s.tokens, device=s.device), overwrite=True).R

    def book(R: Tensor) -> Tensor:
        return torch.cholesky_inverse(R.flip(0, 1)).flip(0, 1)

    work = {"fp32": 2 * n**3 / 3 / 1e9, "copy": 1.5 * R.nbytes / 1e9}
    return Case(
        cholesky.inverse, {"cholesky_inverse": book}, rotated(R), work, relative, limit=1e-2
    )


# ---- obs ----


def sweep(rows: int, cols: int, mode: str, s: Size) -> Case:
    """The sweep given its factor, against the textbook's given its own. Judged by total loss."""
    from distaya_ext.ops import cholesky, obs

    H = shapes.hessian(cols, s.tokens, device=s.device)
    R, U = cholesky.cholesky(H).R, textbook.factor(H)
    mine = our_options(MODES[mode])

    def loss(ours, book) -> float:
        total = float(book.loss.double().sum())
        return abs(float(ours.loss.sum()) / total - 1)

    W = shapes.weights(rows, cols, device=s.device)
    return Case(
        lambda W: obs.sweep_(W.clone(), R, **mine),
        {"textbook sweep": lambda W: textbook.sweep(W, U=U, **MODES[mode])},
        rotated(W),
        {"fp32": rows * cols**2 / 1e9, "copy": 2 * W.nbytes / 1e9},
        loss,
        limit=0.02,
    )


def round_to_nearest(s: Size) -> Case:
    from distaya_ext.ops import obs

    W = shapes.weights(s.hidden, s.hidden, device=s.device)
    return Case(
        lambda W: obs.quantize(W, obs.Quant(4, 128))[0],
        {"textbook rtn": lambda W: textbook.rtn(W, 4, 128).W},
        rotated(W),
        {"copy": 2.25 * W.nbytes / 1e9},  # fp32 in, fp32 and one code byte out
        relative,
        limit=1e-3,
    )


# ---- mask ----


def score(method: str, s: Size) -> Case:
    from distaya_ext.ops import mask

    def ria(W: Tensor, norms: Tensor) -> Tensor:
        A = W.float().abs()
        return (A / A.sum(1, keepdim=True) + A / A.sum(0, keepdim=True)) * norms.sqrt()

    book = {
        "magnitude": lambda W, norms: W.float().abs(),
        "wanda": lambda W, norms: W.float().abs() * norms,
        "ria": ria,
    }
    ours = getattr(mask, method)
    W = shapes.weights(s.hidden, s.ff, device=s.device).bfloat16()
    norms = torch.rand(s.ff, device=s.device) + 0.1
    read = 2 if method == "ria" else 1  # its sums come before its scores
    return Case(
        (lambda W, norms: ours(W)) if method == "magnitude" else ours,
        {"torch": book[method]},
        rotated(W, norms),
        {"copy": (read * 2 + 4) * W.numel() / 1e9},
        relative,
        limit=1e-5,
    )


def keep_half(along: str, s: Size) -> Case:
    """Raw ops: their public wrappers wait for the device to look for a NaN."""
    from distaya_ext.ops import mask

    S = shapes.weights(s.hidden, s.ff, device=s.device).abs()
    group = {"row": s.ff, "column": s.hidden, "matrix": S.numel()}[along]

    def kth(S: Tensor) -> Tensor:  # ties are not exact here; fp32 scores have next to none
        if along == "matrix":
            return S.flatten().kthvalue(group // 2).values < S
        dim = 1 if along == "row" else 0
        return S.kthvalue(group // 2, dim=dim, keepdim=True).values < S

    rulers = {"kthvalue": kth}
    if along == "row":
        rulers["topk, scatter"] = lambda S: torch.zeros_like(S, dtype=torch.bool).scatter_(
            1, S.topk(group // 2, dim=1).indices, True
        )
    return Case(
        lambda S: mask.mask_keep_k(S, group - group // 2, along)[0],
        rulers,
        rotated(S),
        {"copy": 5 * S.numel() / 1e9},
        disagreement,
        limit=1e-4,
    )


def keep_2_4(along: str, s: Size) -> Case:
    from distaya_ext.ops import mask

    S = shapes.weights(s.hidden, s.ff, device=s.device).abs()

    def topk(S: Tensor) -> Tensor:
        groups = S.view(-1, 4) if along == "inputs" else S.view(-1, 4, S.shape[1])
        best = groups.topk(2, dim=1).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).view_as(S)

    return Case(
        lambda S: mask.mask_keep_nm(S, 2, 4, along)[0],
        {"topk, scatter": topk},
        rotated(S),
        {"copy": 5 * S.numel() / 1e9},
        disagreement,
        limit=1e-4,
    )


def cases(section: str, s: Size) -> dict[str, Callable[[], Case]]:
    """Row name -> what builds it, cheap rows first. Raises KeyError for an unknown section."""
    d, ff, t = s.hidden, s.ff, s.tokens
    joint = list(MODES)[-1]  # of all matrices that share an input at once, and of down
    swept = [(d, d, MODES), (ff, d, MODES), (s.qkv + 2 * ff, d, [joint]), (d, ff, [joint])]
    table: dict[str, dict[str, Callable[[], Case]]] = {
        "hessian": {
            f"column_sq_ {ff} x {t} bf16": lambda: column_sq(ff, s),
            f"symmetrize_ {ff}": lambda: symmetrize(ff, s),
            f"hessian_ {d} x {t} bf16": lambda: hessian(d, s),
            f"hessian_ {ff} x {t} bf16": lambda: hessian(ff, s),
        }
        | gpu_refine.cross_cases(s),
        "cholesky": {
            f"{make.__name__} {n}": (lambda make=make, n=n: make(n, s))
            for n in (d, ff)
            for make in (factor, inverse_factor, inverse)
        }
        | gpu_refine.solve_cases(s),
        "obs": {f"quantize {d}x{d} int4 g128": lambda: round_to_nearest(s)}
        | {
            f"sweep_ {rows}x{cols}, {mode}": (
                lambda rows=rows, cols=cols, mode=mode: sweep(rows, cols, mode, s)
            )
            for rows, cols, modes in swept
            for mode in modes
        },
        "mask": {
            f"{method} {d}x{ff} bf16": (lambda method=method: score(method, s))
            for method in ("magnitude", "wanda", "ria")
        }
        | {
            f"keep_nm {d}x{ff} 2:4 {along}": (lambda along=along: keep_2_4(along, s))
            for along in ("inputs", "outputs")
        }
        | {
            f"keep_k {d}x{ff} half, {along}": (lambda along=along: keep_half(along, s))
            for along in ("row", "column", "matrix")
        },
        "refit": gpu_refine.refit_cases(s),
        "dass": gpu_refine.dass_cases(s),
        "influence": gpu_influence.cases(s),
        "pack": gpu_packed.pack_cases(s),
        "sqgemm": gpu_products.cases(s),
    }
    return table[section]
