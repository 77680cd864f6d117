"""Products with packed weights that gradients pass: for training what stands beside the weights.

forward   y = x W^T + b by the kernel, with activations as they are
backward  dx = dy W, db = sum of dy, where W is made dense in dy's dtype for this one product

The codes and scales themselves have no gradient here; scales that learn are train/scales.py.
Nothing is kept between forward and backward but the packed buffer, which is there anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import pack, sqgemm

if TYPE_CHECKING:
    from .modules import Packed


def product(held: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias with a gradient for x [..., cols] and bias [rows]; returns [..., rows] as x.

    Under autocast x is rounded to its dtype first, as that of an nn.Linear would be.
    """
    x = working(x)
    weight = held.weights()
    learns = x.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and learns:
        return _Product.apply(x, bias, weight)
    return _forward(x, bias, weight)


def working(x: Tensor) -> Tensor:
    """x in the dtype that autocast multiplies in; itself where there is no autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _forward(x: Tensor, bias: Tensor | None, weight: pack.PackedWeight) -> Tensor:
    if bias is not None:
        bias = bias.detach().to(x.dtype)
    return sqgemm.linear(x.detach(), weight, bias, exact=True)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: pack.PackedWeight) -> Tensor:
        ctx.weight, ctx.bias = weight, None if bias is None else bias.dtype
        return _forward(x, bias, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ pack.dequantize(ctx.weight, dy.dtype)
        if ctx.needs_input_grad[1]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias)
        return dx, db, None
