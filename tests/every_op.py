"""Every op of every room as one small call with fixed inputs: for tests that are about all.

CASES holds name -> make(seed, size) -> call() -> tensors. `make` draws the inputs, `call` leaves
them as they are, so that it can be repeated and run from several threads. Shapes are ragged, and
columns are no multiple of 4, 16 or 128 wherever a method allows it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from distaya_ext.ops import cholesky, dass, hessian, influence, mask, obs, pack, refit, sqgemm
from distaya_ext.quant import Quant

Call = Callable[[], list[Tensor]]
CASES: dict[str, Callable[[int, int], Call]] = {}
SMALL = 1  # `size`: times the rows and columns of the smallest case


def case(make: Callable[..., Call]) -> Callable[..., Call]:
    CASES[make.__name__] = make
    return make


class Draw:
    """Random tensors, the same for the same seed."""

    def __init__(self, seed: int):
        self.rng = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.rng).to(dtype)

    def hessian(self, n: int) -> Tensor:
        X = self.normal(2 * n, n)
        return X.t() @ X / n

    def packed(self, kind: str, rows: int, cols: int, group: int, symmetric: bool = True):
        top = {"int3": 8, "int8": 256}.get(kind, 16)
        codes = torch.randint(0, top, (rows, cols), generator=self.rng, dtype=torch.uint8)
        r, c = torch.arange(rows)[:, None], torch.arange(cols)
        if kind in ("int4-2:4", "int4-out", "int4-mask"):
            codes = codes.masked_fill((r + c) % 4 < 2, 8)
        groups = -(-cols // group) if group else 1
        scales = (self.normal(rows, groups).abs() * 0.01 + 0.001).to(torch.bfloat16)
        zeros = None if symmetric else torch.full((rows, groups), 5, dtype=torch.uint8)
        nm = (2, 4) if kind == "int4-out" else None
        return codes, scales, zeros, {"kind": kind, "group": group, "nm": nm}


@case
def moments(seed: int, size: int = SMALL) -> Call:
    draw, T, C, K = Draw(seed), 70, 67 * size, 45 * size
    X = [draw.normal(T, C, dtype=d) for d in (torch.bfloat16, torch.float16, torch.float32)]
    Y, w = draw.normal(T, K), draw.normal(T).abs()

    def call() -> list[Tensor]:
        H, s, G = torch.zeros(C, C), torch.zeros(C), torch.zeros(K, C)
        for x in X:
            hessian.hessian_(H, x)
        hessian.hessian_(H, X[2], w)
        hessian.column_sq_(s, X[0], w)
        hessian.cross_(G, Y, X[2], w)
        hessian.symmetrize_(H)
        return [H, s, G]

    return call


@case
def factors(seed: int, size: int = SMALL) -> Call:
    draw, n = Draw(seed), 101 * size
    H, B = draw.hessian(n), draw.normal(13 * size, n)

    def call() -> list[Tensor]:
        R = cholesky.cholesky(H).R
        return [R, cholesky.inverse_factor(R), cholesky.inverse(R), cholesky.solve(B, R)]

    return call


@case
def masks(seed: int, size: int = SMALL) -> Call:
    draw, rows, cols = Draw(seed), 24 * size, 48 * size
    W, norms = draw.normal(rows, cols + 5, dtype=torch.bfloat16), draw.normal(cols + 5).abs()
    S = draw.normal(rows, cols)

    def call() -> list[Tensor]:
        scores = [mask.magnitude(W), mask.wanda(W, norms), mask.ria(W, norms)]
        kept = [mask.keep_k(s, 11, along) for s in scores for along in ("row", "column", "matrix")]
        nm = [mask.keep_nm(S, 2, 4, along) for along in ("inputs", "outputs")]
        return scores + kept + nm

    return call


@case
def gated(seed: int, size: int = SMALL) -> Call:
    draw, F, T = Draw(seed), 40 * size, 33
    W, norms, w = draw.normal(F, 27), draw.normal(F).abs(), draw.normal(T).abs()
    gate, up = draw.normal(T, F), draw.normal(T, F)
    scores = draw.normal(F, 19).abs()

    def call() -> list[Tensor]:
        s = torch.zeros(3, F, dtype=torch.float64)
        for act in dass.ACTIVATIONS:
            dass.moments_(s, gate, up, act, w)
        return [s, dass.gate_up(W, norms), dass.balance(scores, (2, 4), rounds=3)]

    return call


@case
def sweeps(seed: int, size: int = SMALL) -> Call:
    draw, rows, cols = Draw(seed), 19 * size, 132 * size
    R = cholesky.cholesky(draw.hessian(cols)).R
    W, keep = draw.normal(rows, cols), draw.normal(rows, cols) > 0
    narrow = draw.normal(rows, 29)  # fewer columns than a group has
    modes = [
        {"sparsity": 0.5},
        {"nm": (2, 4), "quant": Quant(4, 32)},
        {"mask": keep},
        {"quant": Quant(3, 0, symmetric=False)},
        {"sparsity": 0.5, "reference": True},
    ]

    def call() -> list[Tensor]:
        out = []
        for mode in modes:
            swept = W.clone()
            found = obs.sweep_(swept, R, **mode)
            out += [swept, *(t for t in found if t is not None)]
        out += obs.quantize(W.clone(), Quant(4, 32))
        return out + list(obs.quantize(narrow.clone(), Quant(4, 128, symmetric=False)))

    return call


@case
def refits(seed: int, size: int = SMALL) -> Call:
    draw, rows, cols = Draw(seed), 19 * size, 68 * size
    H, W, keep = draw.hessian(cols), draw.normal(rows, cols), draw.normal(rows, cols) > 0

    def call() -> list[Tensor]:
        D, kept = refit.admm(W, H, nm=(2, 4), iterations=3, levels=2)
        return [*refit.refitted(W, keep, H, iterations=3), D, kept]

    return call


@case
def influences(seed: int, size: int = SMALL) -> Call:
    draw, hidden, vocabulary, T = Draw(seed), 36 * size, 300 * size, 7 * size
    targets = torch.arange(T) * 31
    states = {}
    for d in (torch.bfloat16, torch.float32):
        P, Q = draw.normal(T, hidden, dtype=d), draw.normal(2, T, hidden, dtype=d)
        W, bias = draw.normal(vocabulary, hidden, dtype=d), draw.normal(vocabulary, dtype=d)
        states[d] = P, Q, W, bias

    def call() -> list[Tensor]:
        out = []
        for P, Q, W, bias in states.values():
            out.append(influence.similarity(P, Q[0].contiguous()))
            out.append(influence.divergence(P, Q, W, targets, scale=0.1, cap=30.0, bias=bias))
        return out

    return call


@case
def packing(seed: int, size: int = SMALL) -> Call:
    draw, rows, cols = Draw(seed), 67 * size, 141 * size
    matrices = [draw.packed(kind, rows, cols, 32) for kind in pack.KINDS]
    matrices.append(draw.packed("int4", rows, cols, 128, symmetric=False))
    picked = torch.tensor([3, 0, 66, 3])

    def call() -> list[Tensor]:
        out = [pack.survey(matrices[0][0])]
        for codes, scales, zeros, form in matrices:
            packed = pack.pack(codes, scales, zeros, **form)
            out += [packed.data, pack.dequantize(packed), pack.gather(packed, picked)]
            out += [t for t in pack.unpack(packed) if t is not None]
        return out

    return call


@case
def products(seed: int, size: int = SMALL) -> Call:
    draw, rows, cols = Draw(seed), 67 * size, 141 * size
    pairs = []
    for kind in pack.KINDS:
        drawn = [draw.packed(kind, rows, cols, 32) for _ in range(2)]
        pairs.append([pack.pack(c, s, z, **form) for c, s, z, form in drawn])
    xs = [draw.normal(t, cols, dtype=torch.bfloat16) for t in (1, 9)]
    bias = draw.normal(rows, dtype=torch.bfloat16)

    def call() -> list[Tensor]:
        out = []
        for gate, up in pairs:
            for x in xs:
                out += [sqgemm.linear(x, up, bias), sqgemm.glu(x, gate, up)]
            out.append(sqgemm.linear(xs[0], up, exact=True))
        return out

    return call


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two results are the same bits, NaN included."""
    return len(found) == len(expected) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(found, expected, strict=True)
    )
