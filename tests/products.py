"""Packed matrices, and how far a product with them may be from float64. Read by test_sqgemm*.py."""

from dataclasses import dataclass

import pytest
import torch

from distaya_ext.ops import pack as packing
from distaya_ext.ops import sqgemm
from distaya_ext.ops.pack import PackedWeight, pack

U = 2.0**-24
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BOTH = pytest.mark.parametrize("exact", [True, False], ids=["exact", "w4a8"])
# Every kind, int4_out with two patterns.
KINDS = {
    "int4": None,
    "int3": None,
    "int8": None,
    "int4-2:4": None,
    "int4-mask": None,
    "int4-out": (4, 8),
    "int4-out 1:2": (1, 2),
}

# rows, columns, tokens: single ones, whole tiles, ragged ones, several tiles each way
SHAPES = [(1, 1, 1), (64, 128, 4), (65, 127, 7), (3, 300, 2), (200, 131, 13), (130, 400, 1)]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keep(kind: str, nm: tuple[int, int] | None, rows: int, cols: int, seed: int) -> torch.Tensor:
    """Where a kind may hold weights: bool [rows, cols], groups with fewer than allowed included."""
    score = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed))
    some = score > 0.3
    if kind == "int4-mask":
        return some
    if kind not in ("int4-2:4", "int4-out") or not some.numel():
        return torch.ones(rows, cols, dtype=torch.bool)
    n, m = nm or (2, 4)
    lines = score if kind == "int4-2:4" else score.t()
    width = lines.shape[1]
    padded = torch.nn.functional.pad(lines, (0, -width % m), value=-1.0).unflatten(1, (-1, m))
    best = torch.zeros_like(padded, dtype=torch.bool).scatter_(2, padded.topk(n, 2).indices, True)
    best = best.flatten(1)[:, :width]
    return (best if kind == "int4-2:4" else best.t()) & some


def matrix(
    kind: str = "int4",
    rows: int = 70,
    cols: int = 200,
    group: int = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    size: float = 0.02,
) -> PackedWeight:
    """A packed matrix of random codes and scales around ``size``."""
    name, nm = kind.split()[0], KINDS[kind]
    bits = {"int3": 3, "int8": 8}.get(name, 4)
    random = torch.Generator().manual_seed(seed + 1)
    groups = -(-cols // group) if group else 1
    zeros = torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros.random_(0, 2**bits, generator=random)
    codes = torch.empty(rows, cols, dtype=torch.uint8).random_(0, 2**bits, generator=random)
    wide = zeros.repeat_interleave(group or max(cols, 1), 1)[:, :cols]
    codes = codes.where(keep(name, nm, rows, cols, seed), wide).contiguous()
    scales = (size * (0.1 + torch.rand(rows, groups, generator=random))).to(scale_dtype)
    return pack(codes, scales, None if symmetric else zeros, kind=name, group=group, nm=nm)


@dataclass
class Sums:
    """A reference product and how far the fp32 sums may be from it, both fp64 [tokens, rows]."""

    value: torch.Tensor
    error: torch.Tensor


def sums(x: torch.Tensor, packed: PackedWeight, exact: bool, bias: torch.Tensor | None) -> Sums:
    """The reference and the bound before the rounding to y's dtype.

    Exact. One sum of g terms takes g products, each added with a rounding of at most u of what
    has been summed, so at most g u S_group with S = sum |x||w|; at most 4 parts of it are added;
    K / g scaled sums follow, each one rounding; with group 0 the scale and with a bias its
    addition one more: (g + K / g + 4) u S to first order, taken 1 % larger for the higher ones.
    What is below 2^-126 may be flushed where pairs of bf16 are multiplied: 2^-126 times
    scale (1 + |code - zero|) = scale + |w| per element; elsewhere a rounding of a subnormal loses
    2^-150 per scaled sum.
    W4A8. x = s q + d with |d| <= s / 2, up to the rounding of x / s <= 127 (127 u) and of s
    (u |x| <= 127 u s): sum |w| s (1 / 2 + 2^-16). Sums of q (code - zero) are exact, below 2^24 in
    fp32; two roundings scale them, K / g add them up: (K / g + 4) u sum |w| (|x| + s). Where s
    itself is subnormal, 2^-142 per element (csrc/sqgemm/activations.h).
    """
    f = packed.format
    codes, scales, zeros = packing.unpack(packed)
    W = packing.reference_dequantize(codes, scales, zeros, bits=f.bits).abs()
    a, run = x.double().abs(), f.group or 128
    value = sqgemm.reference(x, packed, bias)
    more = 0 if bias is None else bias.double().abs()
    runs = -(-f.cols // run)
    if exact:
        error = 1.01 * (run + runs + 4) * U * (a @ W.t() + more)
        scale = scales.double().repeat_interleave(f.group or max(f.cols, 1), 1)[:, : f.cols].abs()
        return Sums(value, error + 2.0**-126 * (scale + W).sum(1) + runs * 2.0**-150)
    padded = torch.nn.functional.pad(a, (0, -f.cols % run)).unflatten(1, (-1, run))
    step = (padded.amax(2) / 127).repeat_interleave(run, 1)[:, : f.cols]
    error = (0.5 + 2.0**-16) * step @ W.t() + 2.0**-142 * W.sum(1) + runs * 2.0**-149
    return Sums(value, error + 1.01 * (runs + 4) * U * ((a + step) @ W.t() + more))


def sums_of_rounded(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> Sums:
    """The bound where each weight is rounded to x's dtype first, as warpgroups multiply.

    sum |x| (v |w| + z) for those roundings; K products and up to 16 splits added in fp32, with the
    bias, one rounding each, or a cut, which is twice as much: 2 (K + 20) u sum |x| |w| (1 + v).
    """
    relative, least = output(x.dtype)
    W = packing.reference_dequantize(*packing.unpack(packed), bits=packed.format.bits).abs()
    a = x.double().abs()
    terms = a @ W.t() + (0 if bias is None else bias.double().abs())
    error = relative * terms + least * a.sum(1, keepdim=True)
    error += 2.02 * (packed.format.cols + 20) * U * terms
    return Sums(sqgemm.reference(x, packed, bias), error)


def quantized_sums(x: torch.Tensor, packed: PackedWeight) -> Sums:
    """W4A8 with the int8 activations made here, in plain torch: a far closer bound than sums'.

    The integer sums are exact; one rounding scales each, and K / g of them are added with one
    rounding each: (K / g + 1) u sum |x'||w| with x' the rounded activations, 1 % for higher orders.
    """
    run = packed.format.group or 128
    blocks = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % run)).unflatten(1, (-1, run))
    scales = blocks.abs().amax(2, keepdim=True) / 127
    codes = (blocks / scales.where(scales > 0, 1.0)).round().clamp(-127, 127)
    near = (codes.double() * scales.double()).flatten(1)[:, : x.shape[1]]
    W = packing.reference_dequantize(*packing.unpack(packed), bits=packed.format.bits)
    error = 1.01 * (blocks.shape[1] + 1) * U * (near.abs() @ W.abs().t())
    return Sums(near @ W.t(), error)


def output(dtype: torch.dtype) -> tuple[float, float]:
    """Half a last place: relative to a value, and of the subnormals."""
    other = {torch.bfloat16: (2.0**-8, 2.0**-134), torch.float16: (2.0**-11, 2.0**-25)}
    return other.get(dtype, (U, 2.0**-150))


def rounded(s: Sums, dtype: torch.dtype) -> torch.Tensor:
    """The bound of y: that of the sums, and half a last place of y (or of a subnormal)."""
    relative, least = output(dtype)
    return s.error + relative * (s.value.abs() + s.error) + least


def check(y: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    assert y.shape == expected.shape
    excess = (y.double() - expected).abs() - bound
    assert not excess.isnan().any()
    assert y.numel() == 0 or excess.max() <= 0, f"{excess.max():.3g} over the bound"


def check_gated(y: torch.Tensor, g: Sums, u: Sums, act: str) -> None:
    """y against act(g) u: errors of both, of act (slope at most 1.13) and of their product."""
    a, most = sqgemm.reference_act(g.value, act), u.value.abs() + u.error
    error = (1.13 * g.error + 10 * U * (g.value.abs() + g.error)) * most + a.abs() * u.error
    product = Sums(a * u.value, error + U * (a * u.value).abs() + 2.0**-149)
    check(y, product.value, rounded(product, y.dtype))


def check_linear(
    x: torch.Tensor, packed: PackedWeight, exact: bool, bias: torch.Tensor | None = None
) -> torch.Tensor:
    y = sqgemm.linear(x, packed, bias, exact=exact)
    assert y.dtype == x.dtype
    s = sums(x, packed, exact, bias)
    check(y, s.value, rounded(s, x.dtype))
    return y
