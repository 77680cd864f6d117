"""From packed modules back to dense ones: what model.dequantize() does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .modules import PackedEmbedding, PackedHead, PackedLinear, rounded
from .place import replace


def to_dense(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Make all packed modules dense, in place, in dtype (None: that of the model); returns it.

    Its parameters need gradients, as those of a dense model that transformers loads do.
    """
    dtype = dtype or model.dtype
    heads = {n: m for n, m in model.named_modules() if isinstance(m, PackedHead)}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            replace(model, name, _linear(_weight(module, dtype), module.bias))
        elif isinstance(module, PackedEmbedding):
            dense = ScaledEmbedding(_weight(module, dtype), module.padding_idx, module.factor)
            replace(model, name, dense)
            for path, head in heads.items():
                if head.embedding is module:
                    replace(model, path, _linear(dense.weight, head.bias))
    return model.to(dtype).requires_grad_(True)


class ScaledEmbedding(nn.Embedding):
    """nn.Embedding whose rows are multiplied by a factor (None: by nothing)."""

    def __init__(self, weight: nn.Parameter, padding_idx: int | None, factor: float | None) -> None:
        rows, cols = weight.shape
        super().__init__(rows, cols, padding_idx, device="meta")
        self.weight = weight
        self.factor = factor
        self._factor = rounded(factor, weight.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> ScaledEmbedding:
        super()._apply(fn, recurse)
        self._factor = rounded(self.factor, self.weight.dtype)
        return self

    def forward(self, indices: Tensor) -> Tensor:
        rows = super().forward(indices)
        return rows if self._factor is None else rows * self._factor


def _weight(module: PackedLinear | PackedEmbedding, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(module.dequantize(dtype))


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    rows, cols = weight.shape
    dense = nn.Linear(cols, rows, bias=bias is not None, device="meta")
    dense.weight, dense.bias = weight, bias
    return dense
