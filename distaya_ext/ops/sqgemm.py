"""y = x W^T for packed weights, and the gated unit act(x W_gate^T) * (x W_up^T) in one pass.

x keeps its dtype (bf16, fp16 or fp32) and any number of tokens; sums are fp32; y is rounded once.
On the CPU ``exact=False``, the default, multiplies with int8 activations (W4A8): symmetric, per
token and per block of min(group, 128) columns, half a step of max |x| / 127 off at most. A block
with a NaN or an Inf makes every output of its token NaN. ``exact=True`` takes the activations as
they are. On CUDA every product is exact, except that for many tokens (a few hundred; the number is
in csrc/sqgemm/sqgemm.h, with the bounds) panels of W are rounded to x's dtype and multiplied by
torch's dense kernels, which is faster there.
"""

import torch
from torch import Tensor

from distaya_ext import _C
from distaya_ext._op import op
from distaya_ext.ops import pack
from distaya_ext.ops.pack import PackedWeight

_PANEL_BYTES = 64 << 20  # of dequantized weights at once; whole tiles of 64 rows


def _output(x: Tensor, spec: list[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], spec[1]))


def _fake_linear(x: Tensor, data: Tensor, spec: list[int], *_args: object) -> Tensor:
    return _output(x, spec)


def _fake_glu(x: Tensor, gate: Tensor, up: Tensor, spec: list[int], *_args: object) -> Tensor:
    return _output(x, spec)


def _work(x: Tensor, spec: list[int], glu: bool) -> Tensor | None:
    """What the CUDA kernels write partial sums to; None where they need nothing."""
    size = _C.sqgemm_work(x, spec, glu)
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
    y = _output(x, spec)
    work = _work(x, spec, False)
    if not _C.sqgemm_linear(x, data, spec, bias, exact, work, y):
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
    y = _output(x, spec)
    work = _work(x, spec, True)
    if not _C.sqgemm_glu(x, gate, up, spec, act, bias_gate, bias_up, exact, work, y):
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
