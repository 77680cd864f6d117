"""Every op of every room once at small ragged shapes: what compute-sanitizer looks at.

    compute-sanitizer --tool memcheck python bench/gpu_sanitize.py [--device cuda]

Sizes are chosen so that every kind of kernel runs: each dtype, ragged edges of every tile, one to
a few hundred tokens. Results are not judged here (`pytest -m cuda` does), only finite where they
must be. Prints each room's name as it begins.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Appended, not inserted: an installed distaya_ext must win over the source folder.
sys.path.append(str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 7, 33, 65, 130, 300)  # a kernel for each range of tokens


class Inputs:
    """Random tensors made on the CPU: torch's own kernels are not what is looked at."""

    def __init__(self, device: str):
        self.device = device
        self.random = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(dtype).to(self.device)

    def codes(self, kind: str, rows: int, cols: int) -> Tensor:
        """uint8 codes that the kind can hold, pruned ones 8."""
        top = {"int3": 8, "int8": 256}.get(kind, 16)
        codes = torch.randint(0, top, (rows, cols), generator=self.random, dtype=torch.uint8)
        r, c = torch.arange(rows)[:, None], torch.arange(cols)
        if kind in ("int4-2:4", "int4-out", "int4-mask"):
            codes = codes.masked_fill((r + c) % 4 < 2, 8)
        return codes.to(self.device)

    def hessian(self, n: int) -> Tensor:
        X = torch.randn(2 * n, n, generator=self.random)
        return (X.t() @ X / n).to(self.device)


def hessian(make: Inputs) -> None:
    from distaya_ext.ops import hessian as room

    for dtype in DTYPES:
        for tokens, cols in ((70, 200), (1, 33), (300, 129)):
            X, w = make.normal(tokens, cols, dtype=dtype), make.normal(tokens).abs()
            H, s = make.normal(cols, cols).zero_(), make.normal(cols).zero_()
            G, tall = make.normal(cols, cols).zero_(), make.normal(cols + 61, cols).zero_()
            Y = make.normal(tokens, cols + 61, dtype=dtype)
            for weights in (None, w):
                room.hessian_(H, X, weights)
                room.column_sq_(s, X, weights)
                room.cross_(G, X.neg(), X, weights)
                room.cross_(tall, Y, X, weights)
            room.symmetrize_(H)
    finite(H, s, G, tall)


def cholesky(make: Inputs) -> None:
    from distaya_ext.ops import cholesky as room

    for n in (1, 70, 129, 300):
        R = room.cholesky(make.hessian(n)).R
        finite(R, room.inverse_factor(R), room.inverse(R))
        finite(room.solve(make.normal(37, n), R))


def obs(make: Inputs) -> None:
    from distaya_ext.ops import cholesky
    from distaya_ext.ops import obs as room

    rows, cols = 37, 300
    R = cholesky.cholesky(make.hessian(cols)).R
    int4, coarse = room.Quant(4, 128), room.Quant(3, 32, symmetric=False)
    mask = make.normal(rows, cols) > 0
    modes = [{"sparsity": 0.5}, {"nm": (2, 4)}, {"nm": (4, 8)}, {"mask": mask}, {"quant": int4}]
    modes += [{"sparsity": 0.5, "quant": coarse}, {"nm": (2, 4), "quant": int4}]
    for dtype in DTYPES:
        for mode in modes:
            W = make.normal(rows, cols, dtype=dtype)
            finite(room.sweep_(W, R, **mode).loss)
        for quant in (int4, coarse):
            finite(*room.quantize(make.normal(rows, cols, dtype=dtype), quant)[2:])


def mask(make: Inputs) -> None:
    from distaya_ext.ops import mask as room

    for dtype in DTYPES:
        W, norms = make.normal(80, 304, dtype=dtype), make.normal(304).abs()
        scores = [room.magnitude(W), room.wanda(W, norms), room.ria(W, norms)]
        finite(*scores)
    for S in (scores[0], make.normal(16, 1104).abs()):
        for along in ("row", "column", "matrix"):
            room.keep_k(S, 1, along)
        for along in ("inputs", "outputs"):
            for n, m in ((2, 4), (4, 8), (1, 16)):
                room.keep_nm(S, n, m, along)


def refit(make: Inputs) -> None:
    from distaya_ext.ops import refit as room

    for rows, cols in ((37, 300), (130, 129), (1, 4)):
        H = make.hessian(cols)
        mask = make.normal(rows, cols) > 0
        for dtype in DTYPES:
            W, target = (make.normal(rows, cols, dtype=dtype) for _ in range(2))
            finite(*room.refitted(W, mask, H, iterations=3))
            start = make.normal(rows, cols)
            finite(*room.refitted(W, mask, H, target=target, start=start, iterations=0))
    H, T = make.hessian(300), make.normal(37, 300)
    for choice in ({"nm": (2, 4)}, {"sparsity": 0.5}, {"sparsity": 0.5, "along": "row"}):
        D, kept = room.admm(T, H, iterations=3, levels=2, start=make.normal(37, 300), **choice)
        finite(D, room.refit(T, kept, H, start=D))


def dass(make: Inputs) -> None:
    from distaya_ext.ops import dass as room

    neurons, inputs = 304, 76
    x_norm, w = make.normal(inputs).abs(), make.normal(70).abs()
    s = torch.zeros(3, neurons, dtype=torch.float64).to(make.device)
    for dtype in DTYPES:
        gate, up, down = (make.normal(neurons, inputs, dtype=dtype) for _ in range(3))
        down = down.t().contiguous()
        norms = make.normal(neurons).abs()
        finite(*(room.gate_up(gate, norms, alpha) for alpha in (0.0, 0.3, 0.5, 1.0)))
        for act in room.ACTIVATIONS:
            for weights in (None, w):
                g, u = (make.normal(70, neurons, dtype=dtype) for _ in range(2))
                room.moments_(s, g, u, act, weights)
        finite(s, room.neuron_scores(gate, up, down, s, x_norm))
    for direction in room.DIRECTIONS:
        room.masks(gate, up, down, norms, nm=(2, 4), direction=direction)
        room.masks(gate, up, down, norms, sparsity=0.5, direction=direction)
    scores = make.normal(neurons, 45).abs()  # features that no warp divides
    for n, m in ((1, 2), (2, 4), (4, 8)):
        room.balance(scores, (n, m), rounds=3)
        room.arrange(scores.sum(1), m, scores, (n, m), rounds=2)  # an odd number of groups


def influence(make: Inputs) -> None:
    from distaya_ext.ops import influence as room

    hidden, vocabulary = 76, 2300  # more than one block of the vocabulary
    targets = torch.arange(7).to(make.device) * 300
    for dtype in DTYPES:
        P, W = make.normal(7, hidden, dtype=dtype), make.normal(vocabulary, hidden, dtype=dtype)
        Q, bias = make.normal(2, 7, hidden, dtype=dtype), make.normal(vocabulary, dtype=dtype)
        finite(room.similarity(P, Q[0]), room.divergence(P, Q, W, targets))
        finite(room.divergence(P, Q, W, targets, scale=0.1, cap=30.0, bias=bias))


def pack(make: Inputs) -> None:
    from distaya_ext.ops import pack as room

    for kind in room.KINDS:
        for group in (32, 128, 0):
            packed = matrix(make, kind, 70, 300, group)
            room.unpack(packed)
            picked = torch.tensor([69, 0, 7]).to(make.device)
            for dtype in DTYPES:
                finite(room.dequantize(packed, dtype), room.gather(packed, picked, dtype))
    room.survey(make.codes("int4-mask", 70, 300))


def matrix(make: Inputs, kind: str, rows: int, cols: int, group: int):
    from distaya_ext.ops import pack as room

    groups = -(-cols // group) if group else 1
    scales = (make.normal(rows, groups).abs() * 0.01 + 0.001).to(torch.bfloat16)
    nm = (2, 4) if kind == "int4-out" else None
    return room.pack(make.codes(kind, rows, cols), scales, kind=kind, group=group, nm=nm)


def sqgemm(make: Inputs) -> None:
    from distaya_ext.ops import pack
    from distaya_ext.ops import sqgemm as room

    for kind in pack.KINDS:
        for group in (128, 32):
            weight, gate = (matrix(make, kind, 70, 300, group) for _ in range(2))
            for dtype in DTYPES:
                for tokens in TOKENS:
                    x, bias = make.normal(tokens, 300, dtype=dtype), make.normal(70, dtype=dtype)
                    finite(room.linear(x, weight, bias), room.glu(x, gate, weight))
    for kind in ("int4", "int4-2:4"):  # so many columns that several blocks share a sum
        weight = matrix(make, kind, 130, 2100, 128)
        for tokens in TOKENS:
            finite(room.linear(make.normal(tokens, 2100, dtype=torch.bfloat16), weight))


ROOMS: dict[str, Callable[[Inputs], None]] = {
    room.__name__: room
    for room in (hessian, cholesky, obs, mask, refit, dass, influence, pack, sqgemm)
}


def finite(*tensors: Tensor) -> None:
    for t in tensors:
        if not bool(t.cpu().float().isfinite().all()):
            raise RuntimeError(f"a result of shape {list(t.shape)} holds a NaN or an Inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rooms", default=",".join(ROOMS), help="comma-separated")
    args = parser.parse_args()
    with torch.no_grad():
        for name in args.rooms.split(","):
            print(name, flush=True)
            ROOMS[name](Inputs(args.device))
    if args.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
