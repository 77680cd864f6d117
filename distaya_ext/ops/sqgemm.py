"""y = x W^T for packed weights, and the gated unit act(x W_gate^T) * (x W_up^T) in one pass.

x keeps its dtype (bf16, fp16 or fp32) and any number of tokens; sums are fp32; y is rounded once.
On the CPU ``exact=False``, the default, multiplies with int8 activations (W4A8): symmetric, per
token and per block of min(group, 128) columns, half a step of max |x| / 127 off at most. A block
with a NaN or an Inf makes every output of its token NaN. ``exact=True`` takes the activations as
they are. On CUDA every product is exact, except where W is rounded to x's dtype first (the bounds
are in csrc/sqgemm/sqgemm.h): on compute capability 9.0 from 64 tokens on for int4 and 2:4 int4
with scales of x's dtype, in warpgroup products; elsewhere for a few hundred tokens or more, where
panels of W go through torch's dense kernels.

The warpgroup products are used on a device only after they agreed there with the other kernels:
wgmma_check, which runs by itself before their first use. A mismatch gives one warning, and the
other kernels serve. What is first used inside a CUDA graph's capture cannot be checked there and
is served by the others too.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from distaya_ext import _C
from distaya_ext._op import op
from distaya_ext.ops import pack
from distaya_ext.ops.pack import PackedWeight

_PANEL_BYTES = 64 << 20  # of dequantized weights at once; whole tiles of 64 rows
_WGMMA_TOKENS = 64  # with fewer no door is asked


def _output(x: Tensor, spec: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], spec[1]))


def _fake_linear(x: Tensor, data: Tensor, spec: list[int], *_args: object) -> Tensor:
    return _output(x, spec)


def _fake_glu(x: Tensor, gate: Tensor, up: Tensor, spec: list[int], *_args: object) -> Tensor:
    return _output(x, spec)


@dataclass(frozen=True)
class WgmmaCheck:
    """What wgmma_check found on a device."""

    ok: bool
    report: str


_checks: dict[torch.device, WgmmaCheck] = {}
_forced: bool | None = None


@contextmanager
def force_wgmma(use: bool) -> Iterator[None]:
    """Inside the block the warpgroup products are used wherever they exist, or nowhere, unchecked.

    For tests and measurements. Process-wide, not per thread.
    """
    global _forced
    before, _forced = _forced, use
    try:
        yield
    finally:
        _forced = before


def wgmma_check(device: torch.device, rows: int = 320, cols: int = 1152) -> WgmmaCheck:
    """Multiply by the warpgroup kernels and by the others on ``device`` and compare, each of them.

    Integers and powers of two, so that no product, sum or weight rounds: the results must be equal
    bit for bit. Takes some milliseconds and waits for the device. Raises RuntimeError for a CUDA
    error.
    """
    with torch.device("cpu"):  # whatever the caller's default: the operands are drawn on the host
        return _compare(device, rows, cols)


def wgmma_failed(device: torch.device) -> bool:
    """Whether the check was made on the device and found that its warpgroup products are wrong."""
    check = _checks.get(device)
    return check is not None and not check.ok


def _compare(device: torch.device, rows: int, cols: int) -> WgmmaCheck:
    rng = torch.Generator().manual_seed(0)
    for kind in ("int4", "int4-2:4"):
        for dtype in (torch.bfloat16, torch.float16):
            packed = _exact_weight(kind, rows, cols, dtype, rng).to(device)
            spec = packed.format.spec()
            for tokens in (64, 131):
                x = torch.randint(-8, 9, (tokens, cols), generator=rng).to(device, dtype)
                if not _C.sqgemm_has_wgmma(x, spec):
                    return WgmmaCheck(False, "no warpgroup products on this device")
                y, expected = (
                    _product(x, packed.data, spec, None, False, w) for w in (True, False)
                )
                if not torch.equal(y, expected):
                    off = (y.double() - expected.double()).abs()
                    return WgmmaCheck(
                        False,
                        f"{int((off != 0).sum())} of {y.numel()} values differ from those of the "
                        f"mma kernels, by up to {off.max():.3g} where the largest is "
                        f"{expected.abs().max():.3g} ({kind}, {dtype}, {tokens} tokens)",
                    )
    return WgmmaCheck(True, "equal to the mma kernels bit for bit")


def _exact_weight(
    kind: str, rows: int, cols: int, dtype: torch.dtype, rng: torch.Generator
) -> PackedWeight:
    codes = torch.randint(0, 16, (rows, cols), generator=rng, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (rows, cols // 64), generator=rng, dtype=torch.uint8)
    if kind == "int4-2:4":
        rank = torch.rand(rows, cols // 4, 4, generator=rng).argsort(2).argsort(2)
        codes = codes.where(rank.flatten(1) < 2, zeros.repeat_interleave(64, 1))
    scales = torch.exp2(torch.randint(-4, 1, zeros.shape, generator=rng)).to(dtype)
    return pack.pack(codes, scales, zeros, kind=kind, group=64)


def _wgmma(x: Tensor, spec: list[int]) -> bool:
    """Whether to multiply by the warpgroup kernels."""
    if x.numel() < _WGMMA_TOKENS * spec[2] or _forced is False:
        return False
    if not _C.sqgemm_has_wgmma(x, spec):
        return False
    if _forced:
        return True
    check = _checks.get(x.device)
    if check is None:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        check = _checks[x.device] = wgmma_check(x.device)
        if not check.ok:
            warnings.warn(
                f"the warpgroup products are off on {x.device}: {check.report}. The other kernels "
                "serve; please report this",
                RuntimeWarning,
                stacklevel=2,
            )
    return check.ok


def _work(x: Tensor, spec: list[int], glu: bool, wgmma: bool) -> Tensor | None:
    """What the CUDA kernels write partial sums to; None where they need nothing."""
    size = _C.sqgemm_work(x, spec, glu, wgmma)
    return torch.empty(size, dtype=torch.uint8, device=x.device) if size else None


def _dense(x: Tensor, data: Tensor, spec: list[int], bias: Tensor | None, y: Tensor) -> Tensor:
    """y = x W^T + bias by dense products with panels of W. CUDA, where the kernels decline."""
    rows, cols = spec[1:3]
    flat, out = x.view(-1, cols), y.view(-1, rows)
    step = max(1, _PANEL_BYTES // (64 * cols * x.itemsize)) * 64
    for first in range(0, rows, step):
        last = min(rows, first + step)
        W = pack.pack_dequantize(data, spec, first, last - first, x.dtype)
        if bias is None:
            torch.mm(flat, W.t(), out=out[:, first:last])
        else:
            torch.addmm(bias[first:last], flat, W.t(), out=out[:, first:last])
    return y


@op(fake=_fake_linear)
def sqgemm(x: Tensor, data: Tensor, spec: list[int], bias: Tensor | None, exact: bool) -> Tensor:
    """See linear; data and spec are those of the PackedWeight, x is contiguous."""
    return _product(x, data, spec, bias, exact, _wgmma(x, spec))


def _product(
    x: Tensor, data: Tensor, spec: list[int], bias: Tensor | None, exact: bool, wgmma: bool
) -> Tensor:
    y = _output(x, spec)
    work = _work(x, spec, False, wgmma)
    if not _C.sqgemm_linear(x, data, spec, bias, exact, wgmma, work, y):
        _dense(x, data, spec, bias, y)
    return y


@op(fake=_fake_glu)
def sqgemm_glu(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    spec: list[int],
    act: str,
    bias_gate: Tensor | None,
    bias_up: Tensor | None,
    exact: bool,
) -> Tensor:
    """See glu; gate, up and spec are those of the two PackedWeights, x is contiguous."""
    y, wgmma = _output(x, spec), _wgmma(x, spec)
    work = _work(x, spec, True, wgmma)
    if not _C.sqgemm_glu(x, gate, up, spec, act, bias_gate, bias_up, exact, wgmma, work, y):
        g = _dense(x, gate, spec, bias_gate, torch.empty_like(y))
        u = _dense(x, up, spec, bias_up, y)
        u.copy_(reference_act(g.float(), act) * u.float())
    return y


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, exact: bool = False
) -> Tensor:
    """x W^T + bias for a packed W.

    x: bf16, fp16 or fp32 [..., cols], any strides (a copy is made where it is not contiguous).
    bias: x's dtype [rows], or None. All on one device. exact: CPU only, see the module.
    Returns x's dtype [..., rows]. Raises ValueError where the parts do not fit together, and for a
    tensor that requires grad.
    """
    return sqgemm(x.contiguous(), weight.data, weight.format.spec(), bias, exact)


def glu(
    x: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    *,
    act: str = "silu",
    bias_gate: Tensor | None = None,
    bias_up: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """act(x W_gate^T + bias_gate) * (x W_up^T + bias_up), GLU of arXiv 2002.05202, in one pass.

    x: bf16, fp16 or fp32 [..., cols], any strides (a copy is made where it is not contiguous).
    gate, up: of equal Format. act: "silu", "gelu" (with erf) or "gelu_tanh"; it and the product
    are taken in fp32 before y is rounded. Biases: x's dtype [rows], or None.
    Returns x's dtype [..., rows]. Raises ValueError for different formats, another act, and as
    linear does.
    """
    if gate.format != up.format:
        raise ValueError(
            f"gate is {gate.format} but up is {up.format}; a gated unit needs two equal formats"
        )
    spec = gate.format.spec()
    return sqgemm_glu(x.contiguous(), gate.data, up.data, spec, act, bias_gate, bias_up, exact)


def reference(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with the W of unpack(), in plain torch float64. Returns fp64 [..., rows]."""
    W = pack.reference_dequantize(*pack.unpack(packed), bits=packed.format.bits)
    y = x.double() @ W.t()
    return y if bias is None else y + bias.double()


def reference_act(gate: Tensor, act: str) -> Tensor:
    """The activation of glu on gate, in gate's dtype."""
    if act == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="none" if act == "gelu" else "tanh")
