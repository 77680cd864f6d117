"""What bench/gpu.py times of packed weights: packing, unpacking, and products at Aya-8B's shapes.

Products are measured beside torch's bf16 matmul of the same weights, dequantized; where torch has
them (CUDA only) also beside its own int4 (tinygemm) and its 2:4 bf16 product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench import shapes
from bench.gpu_case import Case, Size, relative, rotated

if TYPE_CHECKING:
    from distaya_ext.ops.pack import PackedWeight

GROUP = 128
DECODE = ("int4", "int4-2:4", "int3", "int4-mask", "int4-out")
TOKENS = (1, 16, 64, 256, 2048)
ROUNDING = 1e-2  # two bf16 roundings of the weights and one of y, against one of y


def codes_of(kind: str, rows: int, cols: int, device: str) -> Tensor:
    """Random codes uint8 [rows, cols]; sparse kinds keep half."""
    rng = torch.Generator(device).manual_seed(3)
    top = {"int3": 8, "int8": 256}.get(kind, 16)
    codes = torch.randint(0, top, (rows, cols), generator=rng, device=device, dtype=torch.uint8)
    r, c = torch.arange(rows, device=device)[:, None], torch.arange(cols, device=device)
    if kind == "int4-2:4":
        return codes.masked_fill_((c + r) % 4 < 2, 8)
    if kind == "int4-out":
        return codes.masked_fill_((c + r) % 4 < 2, 8)
    if kind == "int4-mask":
        return codes.masked_fill_(torch.rand(codes.shape, generator=rng, device=device) < 0.5, 8)
    return codes


def packed(kind: str, rows: int, cols: int, device: str) -> tuple[PackedWeight, Tensor, Tensor]:
    """A packed matrix (int8: a scale per row), its codes and scales."""
    from distaya_ext.ops import pack

    codes = codes_of(kind, rows, cols, device)
    group = 0 if kind == "int8" else GROUP
    scales = torch.rand(rows, cols // GROUP if group else 1, device=device) + 0.5
    scales = (scales * 0.01).bfloat16()
    nm = (2, 4) if kind == "int4-out" else None
    return pack.pack(codes, scales, kind=kind, group=group, nm=nm), codes, scales


def writing(s: Size) -> Case:
    """Packing, beside the least that any packing does: two codes to a byte."""
    from distaya_ext.ops import pack

    codes = codes_of("int4", s.ff, s.hidden, s.device)
    scales = torch.ones(s.ff, s.hidden // GROUP, device=s.device, dtype=torch.bfloat16)
    form = pack.Format("int4", s.ff, s.hidden)

    def back(data: PackedWeight, _pairs: object) -> float:
        return float((pack.unpack(data)[0] != codes).double().mean())

    return Case(
        lambda codes: pack.pack(codes, scales, group=GROUP),
        {"two to a byte": lambda codes: codes[:, ::2] << 4 | codes[:, 1::2]},
        rotated(codes),
        {"copy": (codes.nbytes + form.nbytes) / 1e9},
        back,
        limit=0.0,
    )


def dequantizing(kind: str, s: Size) -> Case:
    from distaya_ext.ops import pack

    weight, codes, scales = packed(kind, s.ff, s.hidden, s.device)
    zero = 1 << weight.format.bits - 1

    def book(_data: Tensor, codes: Tensor) -> Tensor:
        wide = scales.float().repeat_interleave(codes.shape[1] // scales.shape[1], 1)
        return ((codes.float() - zero) * wide).bfloat16()

    return Case(
        lambda data, _codes: pack.dequantize(pack.PackedWeight(data, weight.format)),
        {"codes to bf16": book},
        rotated(weight.data, codes),
        {"copy": (weight.nbytes + 2 * codes.numel()) / 1e9},
        lambda a, b: relative(a.float(), b.float()),
        limit=0.0,
    )


def rivals(kind: str, codes: Tensor, scales: Tensor, W: Tensor) -> dict[str, Callable]:
    """torch's own products of the same weights, where this torch has them for a GPU."""
    if not W.is_cuda:
        return {}
    found: dict[str, Callable] = {}
    if kind == "int4":
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        theirs = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        grid = torch.stack([scales.t(), torch.zeros_like(scales.t())], 2).contiguous()
        found["torch int4"] = lambda x, *_: torch.ops.aten._weight_int4pack_mm(
            x, theirs, GROUP, grid
        )
    if kind == "int4-2:4":
        sparse = torch.sparse.to_sparse_semi_structured(W)
        found["torch 2:4 bf16"] = lambda x, *_: torch.nn.functional.linear(x, sparse)
    return found


def product(kind: str, rows: int, cols: int, tokens: int, s: Size) -> Case:
    from distaya_ext.ops import pack, sqgemm

    weight, codes, scales = packed(kind, rows, cols, s.device)
    W = pack.dequantize(weight)
    x = shapes.activations(tokens, cols, device=s.device)
    y = 2 * tokens * rows
    return Case(
        lambda x, data, _W: sqgemm.linear(x, pack.PackedWeight(data, weight.format), exact=True),
        {"bf16 matmul": lambda x, _data, W: x @ W.t()} | rivals(kind, codes, scales, W),
        rotated(x, weight.data, W),
        {"copy": (weight.nbytes + x.nbytes + y) / 1e9, "bf16": 2 * tokens * rows * cols / 1e9},
        lambda a, b: relative(a.float(), b.float()),
        limit=ROUNDING,
    )


def gated(kind: str, tokens: int, s: Size) -> Case:
    from distaya_ext.ops import pack, sqgemm

    gate, _, _ = packed(kind, s.ff, s.hidden, s.device)
    up = pack.PackedWeight(gate.data.clone(), gate.format)
    G, U = pack.dequantize(gate), pack.dequantize(up)
    x = shapes.activations(tokens, s.hidden, device=s.device)

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sqgemm.glu(
            x, pack.PackedWeight(a, gate.format), pack.PackedWeight(b, gate.format), exact=True
        )

    return Case(
        ours,
        {"bf16 matmuls": lambda x, *_: torch.nn.functional.silu(x @ G.t()) * (x @ U.t())},
        rotated(x, gate.data, up.data),
        {
            "copy": (2 * gate.nbytes + x.nbytes + 2 * tokens * s.ff) / 1e9,
            "bf16": 4 * tokens * s.ff * s.hidden / 1e9,
        },
        lambda a, b: relative(a.float(), b.float()),
        limit=2 * ROUNDING,
    )


def pack_cases(s: Size) -> dict[str, Callable[[], Case]]:
    kinds = ("int4", "int4-2:4", "int4-mask", "int8")
    return {f"pack {s.ff}x{s.hidden} int4": lambda: writing(s)} | {
        f"dequantize {s.ff}x{s.hidden} {kind}": (lambda kind=kind: dequantizing(kind, s))
        for kind in kinds
    }


def sqgemm_cases(s: Size) -> dict[str, Callable[[], Case]]:
    """[gate|up] and down of a layer, the GLU in one, and the head."""
    d, ff, head = s.hidden, s.ff, 256000 * s.hidden // 4096
    wanted = [(kind, 2 * ff, d, m) for kind in DECODE[:2] for m in TOKENS]
    wanted += [(kind, d, ff, m) for kind in DECODE[:2] for m in (1, 16)]
    wanted += [(kind, 2 * ff, d, 1) for kind in DECODE[2:]] + [("int8", head, d, 1)]
    return {
        f"linear {rows}x{cols} {kind}, {m}": (
            lambda kind=kind, rows=rows, cols=cols, m=m: product(kind, rows, cols, m, s)
        )
        for kind, rows, cols, m in wanted
    } | {f"glu {ff}x{d} {kind}, 1": (lambda kind=kind: gated(kind, 1, s)) for kind in DECODE[:2]}
