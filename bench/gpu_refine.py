"""What bench/gpu.py times beyond one sweep, at Aya-8B's shapes: what a solve aims at (cross moment
and right solve), refit and ADMM of the room refit, and the room dass.

Stacks are those of the driver: the rows of all matrices that share an input, and down. Ops that
work in place get a fresh copy of what they change, which is nothing beside what they do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import refined, shapes
from bench.gpu_case import Case, Size, relative, rotated

ITERATIONS = 10  # of a refit, as the driver has it
DAMP, RHO = 0.01, 0.3

# ---- what a solve aims at ----


def cross(rows: int, columns: int, s: Size) -> Case:
    """G [rows, columns] += Y^T X: of equal width dense inputs are Y, else the outputs wanted."""
    from distaya_ext.ops.hessian import cross_

    G, book = (torch.zeros(rows, columns, device=s.device) for _ in range(2))

    def ours(Y: Tensor, X: Tensor) -> Tensor:
        cross_(G, Y, X)
        return G

    rulers = {"mm fp32": lambda Y, X: book.addmm_(Y.float().t(), X.float())}
    if s.device == "cuda":  # the tensor cores' way, exact products summed in fp32
        rulers["mm bf16 to fp32"] = lambda Y, X: torch.mm(Y.t(), X, out_dtype=torch.float32)
    Y = shapes.activations(s.tokens, rows, seed=5, device=s.device)
    X = shapes.activations(s.tokens, columns, device=s.device)
    work = {
        "bf16": 2 * rows * columns * s.tokens / 1e9,
        "copy": (Y.nbytes + X.nbytes + 2 * G.nbytes) / 1e9,
    }
    return Case(ours, rulers, rotated(Y, X), work, relative, limit=1e-4)


def solve(rows: int, n: int, s: Size) -> Case:
    """B (R R^T)^-1, two substitutions."""
    from distaya_ext.ops import cholesky

    R = cholesky.cholesky(shapes.hessian(n, s.tokens, device=s.device), overwrite=True).R
    R.triu_()  # only this is read; torch's solver is told so, too

    def ours(B: Tensor) -> Tensor:
        X = B.clone()
        cholesky.solve_(X, R)
        return X

    def book(B: Tensor) -> Tensor:
        X = torch.linalg.solve_triangular(R.t(), B, upper=False, left=False)
        return torch.linalg.solve_triangular(R, X, upper=True, left=False)

    B = shapes.weights(rows, n, device=s.device)
    work = {"fp32": 2 * rows * n**2 / 1e9, "copy": (2 * B.nbytes + R.nbytes / 2) / 1e9}
    return Case(ours, {"solve_triangular, twice": book}, rotated(B), work, relative, limit=1e-3)


# ---- refit ----


def products(rows: int, cols: int, count: int) -> float:
    """GFLOP of so many products [rows, cols] x [cols, cols]."""
    return count * 2 * rows * cols**2 / 1e9


def loss(Q: Tensor, T: Tensor, H: Tensor) -> float:
    """Sum over the rows of (Q - T) H' (Q - T)^T, H' damped."""
    E = Q.float() - T.float()
    ridge = float(DAMP * H.diagonal().mean())
    return float(((E @ H).add_(E, alpha=ridge)).mul_(E).sum(dtype=torch.float64))


def refit(rows: int, cols: int, s: Size) -> Case:
    """Conjugate gradients on a 2:4 mask. Judged by the loss reached, as iterates may part."""
    from distaya_ext.ops import mask as mask_op
    from distaya_ext.ops import refit as room

    W = shapes.weights(rows, cols, device=s.device)
    H = shapes.hessian(cols, s.tokens, device=s.device)
    mask = mask_op.mask_keep_nm(W.abs(), 2, 4, "inputs")[0]
    options = {"damp": DAMP, "iterations": ITERATIONS}
    return Case(
        lambda W, mask: room.refit(W, mask, H, **options),
        {"torch": lambda W, mask: refined.refit(W, mask, H, **options)},
        rotated(W, mask),
        {  # one product to begin with
            "fp32": products(rows, cols, ITERATIONS + 1),
            "copy": (2 * W.nbytes + mask.nbytes + H.nbytes) / 1e9,
        },
        lambda ours, book: abs(loss(ours, W, H) / loss(book, W, H) - 1),
        limit=0.01,
    )


def admm(rows: int, cols: int, s: Size) -> Case:
    """One iteration, up to the scores of the next mask, with an inverse that is given."""
    from distaya_ext.ops import cholesky
    from distaya_ext.ops import mask as mask_op
    from distaya_ext.ops import refit as room

    A, d, _ = room.unit_columns(shapes.hessian(cols, s.tokens, device=s.device))
    G = shapes.weights(rows, cols, device=s.device) * d
    Y = torch.addmm(G, G, A, beta=DAMP)
    inverse = cholesky.inverse(cholesky.cholesky(A, damp=DAMP + RHO, overwrite=True).R)
    mask = mask_op.mask_keep_nm(G.abs(), 2, 4, "inputs")[0]
    scores = torch.empty_like(G)

    def ours(G: Tensor, mask: Tensor, Y: Tensor) -> Tensor:
        G = G.clone()
        room.admm_(G, scores, mask, Y, inverse, RHO, 1.0)
        return G

    return Case(
        ours,
        {"torch": lambda G, mask, Y: refined.admm_iteration(G, mask, Y, inverse, RHO)[0]},
        rotated(G, mask, Y),
        {  # G read and written, the scores written, Y and the inverse read
            "fp32": products(rows, cols, 1),
            "copy": (4 * G.nbytes + mask.nbytes + inverse.nbytes) / 1e9,
        },
        relative,
        limit=1e-4,
    )


def whole_admm(rows: int, cols: int, s: Size) -> Case:
    """Masks of 2:4 and weights from nothing but T and H: 30 iterations, an inverse per rho. Judged
    by the loss, as near ties go either way."""
    from distaya_ext.ops import refit as room

    W = shapes.weights(rows, cols, device=s.device)
    H = shapes.hessian(cols, s.tokens, device=s.device)
    inverses = 6 * cols**3 / 1e9  # factor, its inverse and their product
    return Case(
        lambda W: room.admm(W, H, nm=(2, 4), damp=DAMP)[0],
        {"torch": lambda W: refined.admm(W, H, damp=DAMP)},
        rotated(W),
        {
            "fp32": products(rows, cols, 31) + inverses,
            "copy": (2 * W.nbytes + H.nbytes) / 1e9,
        },
        lambda ours, book: abs(loss(ours, W, H) / loss(book, W, H) - 1),
        limit=0.02,
    )


def multiply(rows: int, cols: int, s: Size) -> Case:
    """The product that both are made of, beside cuBLAS in fp32."""
    from distaya_ext.ops.refit import multiply_

    C, book = (torch.zeros(rows, cols, device=s.device) for _ in range(2))
    B = shapes.weights(cols, cols, seed=3, device=s.device)

    def ours(X: Tensor) -> Tensor:
        multiply_(C, X, B)
        return C

    X = shapes.weights(rows, cols, device=s.device)
    work = {"fp32": products(rows, cols, 1), "copy": (3 * X.nbytes + B.nbytes) / 1e9}
    rulers = {"addmm fp32": lambda X: book.addmm_(X, B)}
    return Case(ours, rulers, rotated(X), work, relative, limit=1e-4)


# ---- dass ----


def dass_score(s: Size) -> Case:
    from distaya_ext.ops import dass

    W = shapes.weights(s.ff, s.hidden, device=s.device).bfloat16()
    norms = torch.rand(s.ff, device=s.device) + 0.1
    return Case(
        dass.gate_up,
        {"torch": lambda W, norms: W.float().abs() * norms.sqrt()[:, None]},
        rotated(W, norms),
        {"copy": (W.nbytes + 4 * W.numel()) / 1e9},
        relative,
        limit=1e-5,
    )


def dass_moments(s: Size) -> Case:
    """All three sums of a SwiGLU, of which nothing is stored on the way."""
    from distaya_ext.ops import dass

    mine, book = (torch.zeros(3, s.ff, dtype=torch.float64, device=s.device) for _ in range(2))

    def ours(gate: Tensor, up: Tensor) -> Tensor:
        dass.moments_(mine, gate, up, "silu")
        return mine

    def torch_way(gate: Tensor, up: Tensor) -> Tensor:
        g, u = gate.float(), up.float()
        half = g.sigmoid()
        act, slope = g * half, half * (1 + g * (1 - half))
        for total, term in zip(book, (act * u, act, slope * u), strict=True):
            total += term.square().sum(0)
        return book

    gate, up = (
        shapes.weights(s.tokens, s.ff, seed, s.device).mul_(50).bfloat16() for seed in (6, 7)
    )
    return Case(
        ours,
        {"torch": torch_way},
        rotated(gate, up),
        {"copy": (gate.nbytes + up.nbytes) / 1e9},
        relative,
        limit=1e-4,
    )


def dass_balance(n: int, m: int, s: Size) -> Case:
    """One round of exchanges between the groups of down's columns. Judged by the mass that is
    pruned afterwards: of exchanges that gain the same either may be made."""
    from distaya_ext.ops import dass

    scores = shapes.weights(s.ff, s.hidden, device=s.device).abs()
    scores *= torch.rand(s.ff, 1, device=s.device) + 0.1
    order = torch.arange(s.ff, device=s.device)

    def ours(scores: Tensor) -> Tensor:
        found = order.clone()
        dass.dass_balance_(found, scores, n, m, 1)
        return found

    def off(mine: Tensor, book: Tensor) -> float:
        masses = [float(dass.pruned_mass(scores, o, (n, m))) for o in (mine, book, order)]
        return abs(masses[0] - masses[1]) / (masses[2] - masses[1])  # of what is gained

    return Case(
        ours,
        {"torch": lambda scores: refined.balance_round(scores, order, n, m)},
        rotated(scores),
        {"copy": scores.nbytes / 1e9},
        off,
        limit=1e-3,
    )


# ---- the sections' rows ----


def cross_cases(s: Size) -> dict[str, Callable[[], Case]]:
    return {
        f"cross_ {rows}x{cols} x {s.tokens} bf16": lambda cols=cols, rows=rows: cross(rows, cols, s)
        for rows, cols in ((s.hidden, s.hidden), (s.hidden, s.ff))
    }


def stacks(s: Size) -> tuple[tuple[int, int], ...]:
    """[o], [q|k|v|gate|up] and [down]."""
    return (s.hidden, s.hidden), (s.qkv + 2 * s.ff, s.hidden), (s.hidden, s.ff)


def solve_cases(s: Size) -> dict[str, Callable[[], Case]]:
    return {
        f"solve_ {rows}x{cols}": lambda rows=rows, cols=cols: solve(rows, cols, s)
        for rows, cols in stacks(s)
    }


def refit_cases(s: Size) -> dict[str, Callable[[], Case]]:
    d = s.hidden
    makers = {"multiply_": multiply, "admm_": admm, "refit": refit}
    return {
        f"{name} {rows}x{cols}": lambda make=make, rows=rows, cols=cols: make(rows, cols, s)
        for name, make in makers.items()
        for rows, cols in stacks(s)
    } | {f"admm {d}x{d} 2:4, 30 iterations": lambda: whole_admm(d, d, s)}


def dass_cases(s: Size) -> dict[str, Callable[[], Case]]:
    return {
        f"gate_up {s.ff}x{s.hidden} bf16": lambda: dass_score(s),
        f"moments_ {s.ff} x {s.tokens} bf16 silu": lambda: dass_moments(s),
    } | {
        f"balance {s.ff}x{s.hidden} {n}:{m}, one round": lambda n=n, m=m: dass_balance(n, m, s)
        for n, m in ((2, 4), (4, 8))
    }
