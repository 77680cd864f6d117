"""Scales of packed matrices that learn while the codes stay: W = round(s e^m) (q - z).

m [rows, groups], float32 and 0 at the start, learns; s e^m is rounded to the dtype in which the
folder stores scales, and its gradient passes the rounding as if there were none (straight-through,
arXiv 1308.3432). So what is trained is what can be written. W is dense, in float32, while it is
multiplied, forward and backward; between the two only its packed codes are held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import pack
from ..runtime.gradient import working
from ..runtime.modules import PackedLinear
from ..runtime.place import replace

PARAMETER = "log_multiplier"


class ScaledLinear(nn.Module):
    """A PackedLinear whose scales learn; it stands in its place.

    unit is the packed matrix with scales of 1, which makes q - z out of the kernels' own layout.
    """

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = packed.cols, packed.rows
        self.stored, self.exact = packed.stored, True
        held = packed.weights()
        codes, given, zeros = pack.unpack(held)
        ones = torch.ones_like(given)
        form = held.format
        unit = pack.pack(codes, ones, zeros, kind=form.kind, group=form.group, nm=form.nm)
        self.format, self.group = unit.format, form.group
        self.register_buffer("unit", unit.data, persistent=False)
        self.register_buffer("given", given.float(), persistent=False)
        self.register_parameter("bias", packed.bias)
        self.register_parameter(PARAMETER, nn.Parameter(torch.zeros_like(self.given)))

    @property
    def qweight(self) -> Tensor:
        """The buffer, by the name under which PEFT looks for the device of quantised weights."""
        return self.unit

    def scales(self) -> Tensor:
        """s e^m in the dtype of the folder, [rows, groups]."""
        return (self.given * self.log_multiplier.exp()).to(self.stored)

    def dense(self, spread: Tensor) -> Tensor:
        """(q - z) times per-group numbers [rows, groups]: float32 [rows, cols]."""
        unit = pack.dequantize(pack.PackedWeight(self.unit, self.format), torch.float32)
        return unit.mul_(self._spread(spread.float()))

    def gathered(self, per_weight: Tensor) -> Tensor:
        """Sums over groups: [rows, cols] -> [rows, groups]."""
        if not self.group:
            return per_weight.sum(1, keepdim=True)
        short = -per_weight.shape[1] % self.group
        padded = nn.functional.pad(per_weight, (0, short))
        return padded.unflatten(1, (-1, self.group)).sum(2)

    def _spread(self, per_group: Tensor) -> Tensor:
        if per_group.shape[1] == 1:
            return per_group
        return per_group.repeat_interleave(self.group, dim=1)[:, : self.in_features]

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(working(x), self.log_multiplier, self.bias, self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, multiplier: Tensor, bias: Tensor | None, module: ScaledLinear
    ) -> Tensor:
        scales = module.scales()
        ctx.save_for_backward(x, scales)
        ctx.module, ctx.bias = module, None if bias is None else bias.dtype
        W = module.dense(scales).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x, W, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scales = ctx.saved_tensors
        W = ctx.module.dense(scales)
        dx = dm = db = None
        if ctx.needs_input_grad[0]:
            dx = dy @ W.to(dy.dtype)
        flat = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:  # d/dm of s e^m (q - z) is the weight itself
            dW = (flat.t() @ x.reshape(-1, x.shape[-1])).float()
            dm = ctx.module.gathered(dW.mul_(W))
        if ctx.needs_input_grad[2]:
            db = flat.sum(0, dtype=torch.float32).to(ctx.bias)
        return dx, dm, db, None


def attach(model: nn.Module, name: str, packed: PackedLinear) -> ScaledLinear:
    """Put a ScaledLinear in the place of the packed module of this name; its scales learn."""
    module = ScaledLinear(packed)
    replace(model, name, module)
    return module
