"""What bench/gpu.py times of products with packed weights, at Aya-8B's shapes.

Beside torch's bf16 matmul of the same weights, dequantized (cuBLAS), and where torch has them (on
CUDA) its own int4 (tinygemm) and 2:4 products. Weights come from memory: every contender goes
through so many copies of its own that four times the L2 pass before one is used again. Calls are
captured into CUDA graphs, so no launch is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import shapes
from bench.gpu_case import Case, Size, copies, relative
from bench.gpu_packed import GROUP, packed
from distaya_ext.ops import pack, sqgemm

TOKENS = (1, 8, 16, 32, 64, 128, 512, 2048)
MANY = 64  # tokens from which other kernels may serve
MAIN = ("int4", "int4-2:4")
TINYGEMM = 128  # tokens up to which torch's int4 is measured: above, it is no contender
BF16 = "torch bf16"  # the ruler of the bars
ROUNDING = 1e-2  # two bf16 roundings of the weights and one of y, against one of y


@dataclass(frozen=True)
class Weights:
    """One matrix (glu: two, gate above up) in every contender's form, each in so many copies."""

    kind: str
    forms: list[tuple]  # per copy: (ours, W bf16, torch's int4 or 2:4 form, or None)
    nbytes: int  # of ours


@functools.lru_cache(maxsize=1)  # cases are in the order of their matrices
def weights(kind: str, rows: int, cols: int, glu: bool, device: str) -> Weights:
    parts = [packed(kind, rows // 2 if glu else rows, cols, device)] * (2 if glu else 1)
    own = [pack.PackedWeight(p.data.clone(), p.format) for p, _, _ in parts]
    W = torch.cat([pack.dequantize(p) for p in own])
    codes, scales = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    nbytes = sum(p.nbytes for p in own)
    gpu = W.is_cuda
    grid = torch.stack([scales.t(), torch.zeros_like(scales.t())], 2).contiguous()

    def forms() -> tuple:
        fresh = [pack.PackedWeight(p.data.clone(), p.format) for p in own]
        theirs: object = None
        try:
            if gpu and kind == "int4":
                pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
                theirs = torch.ops.aten._convert_weight_to_int4pack(pairs, 8), grid.clone()
            if gpu and kind == "int4-2:4":
                theirs = torch.sparse.to_sparse_semi_structured(W)
        except Exception as error:  # told by the row, which is measured without it
            theirs = error
        return fresh, W.clone(), theirs

    return Weights(kind, [forms() for _ in range(copies(nbytes, device))], nbytes)


def rivals(kind: str, tokens: int, device: str) -> dict[str, Callable]:
    """torch's own products of the same weights, where this torch has them for a GPU."""

    def made(theirs: object) -> object:
        if isinstance(theirs, Exception):
            raise theirs
        return theirs

    def four(x: Tensor, _own: object, _W: object, theirs: object) -> Tensor:
        codes, grid = made(theirs)
        return torch.ops.aten._weight_int4pack_mm(x, codes, GROUP, grid)

    def sparse(x: Tensor, _own: object, _W: object, theirs: object) -> Tensor:
        return torch.nn.functional.linear(x, made(theirs))

    if device == "cuda" and kind == "int4" and tokens <= TINYGEMM:
        return {"torch int4": four}
    return {"torch 2:4": sparse} if device == "cuda" and kind == "int4-2:4" else {}


def product(kind: str, rows: int, cols: int, tokens: int, s: Size) -> Case:
    held = weights(kind, rows, cols, False, s.device)
    x = shapes.activations(tokens, cols, device=s.device)
    return Case(
        lambda x, own, *_: sqgemm.linear(x, own[0], exact=True),
        {BF16: lambda x, own, W, *_: torch.mm(x, W.t())} | rivals(kind, tokens, s.device),
        [(x, *forms) for forms in held.forms],
        work(held, x, rows, rows),
        lambda a, b: relative(a.float(), b.float()),
        limit=ROUNDING,
        graph=True,
        of={"op": "linear", "kind": kind, "rows": rows, "cols": cols, "tokens": tokens},
    )


def gated(kind: str, rows: int, cols: int, tokens: int, s: Size) -> Case:
    """silu(x gate^T) * (x up^T), rows of both counted. The ruler of the bars is the product alone;
    torch's whole unit, two more kernels, stands beside it."""
    held = weights(kind, rows, cols, True, s.device)
    x = shapes.activations(tokens, cols, device=s.device)

    def unit(x: Tensor, _own: object, W: Tensor, *_: object) -> Tensor:
        gate, up = torch.mm(x, W.t()).chunk(2, 1)
        return torch.nn.functional.silu(gate) * up

    alone = {BF16: lambda x, own, W, *_: torch.mm(x, W.t())}
    return Case(
        lambda x, own, *_: sqgemm.glu(x, own[0], own[1], exact=True),
        {"torch bf16 glu": unit} | alone | rivals(kind, tokens, s.device),
        [(x, *forms) for forms in held.forms],
        work(held, x, rows, rows // 2),
        lambda a, b: relative(a.float(), b.float()),
        limit=2 * ROUNDING,
        graph=True,
        of={"op": "glu", "kind": kind, "rows": rows, "cols": cols, "tokens": tokens},
    )


def work(held: Weights, x: Tensor, rows: int, out: int) -> dict[str, float]:
    """GB that must move (y has `out` columns), and GFLOP: half of them where sparse tensor cores
    can leave the zeros of 2:4 out."""
    tokens, cols = x.shape
    moved = held.nbytes + x.nbytes + 2 * tokens * out
    flops = 2 * tokens * rows * cols / (2 if held.kind == "int4-2:4" else 1)
    return {"copy": moved / 1e9, "bf16": flops / 1e9}


def cases(s: Size) -> dict[str, Callable[[], Case]]:
    """gate|up as a gated unit, [q|k|v|gate|up], [q|k|v], down, [o|down] and the head.

    Every kind of layout once; int4 and 2:4 at every number of tokens. Few tokens come first, so
    that their figures are kept whatever the kernels for many do to the device.
    """
    d, ff, qkv, head = s.hidden, s.ff, s.qkv, 256000 * s.hidden // 4096
    linears = ((qkv + 2 * ff, d), (qkv, d), (d, ff), (d, d + ff))
    few: dict[str, Callable[[], Case]] = {}
    many: dict[str, Callable[[], Case]] = {}

    def add(kind: str, rows: int, cols: int, tokens: int, glu: bool = False) -> None:
        make, found = gated if glu else product, few if tokens < MANY else many
        found[f"{'glu' if glu else 'linear'} {rows}x{cols} {kind}, {tokens}"] = lambda: make(
            kind, rows, cols, tokens, s
        )

    for kind in MAIN:
        for tokens in TOKENS:
            add(kind, 2 * ff, d, tokens, glu=True)
    for tokens in (1, 8, 16, 64):
        add("int8", head, d, tokens)
    for rows, cols in linears:
        for kind in MAIN:
            for tokens in TOKENS:
                add(kind, rows, cols, tokens)
    for kind in ("int3", "int4-mask", "int4-out", "int8"):
        for tokens in (1, 16, 64):
            add(kind, *linears[0], tokens)
    return few | many
