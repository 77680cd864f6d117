"""What bench/gpu.py times of packed weights at Aya-8B's shapes: packing and unpacking them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.gpu_case import Case, Size, relative, rotated

if TYPE_CHECKING:
    from distaya_ext.ops.pack import PackedWeight

GROUP = 128


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
    rng = torch.Generator(device).manual_seed(4)  # the default one is lost to a failed capture
    scales = torch.rand(rows, cols // GROUP if group else 1, generator=rng, device=device) + 0.5
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


def pack_cases(s: Size) -> dict[str, Callable[[], Case]]:
    kinds = ("int4", "int4-2:4", "int4-mask", "int8")
    return {f"pack {s.ff}x{s.hidden} int4": lambda: writing(s)} | {
        f"dequantize {s.ff}x{s.hidden} {kind}": (lambda kind=kind: dequantizing(kind, s))
        for kind in kinds
    }
