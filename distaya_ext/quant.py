"""How weights are put on an integer grid: a description, and its arithmetic in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distaya_ext.dtypes import FLOATS
from distaya_ext.errors import InputError

_SCALE_DTYPES = {dtype: name for name, dtype in FLOATS.items()}
_GROUPS = (0, 32, 64, 128)


@dataclass(frozen=True)
class Quant:
    """An integer grid: weight = scale * (code - zero), code in 0 .. 2^bits - 1.

    bits       2 to 8
    group      columns that share a grid: 32, 64, 128, or 0 for the whole row (always taken from
               the dense weights). A group's grid comes from the weights as they are when the
               sweep reaches it; static=True takes it from the dense weights, in the original
               column order.
    symmetric  zero is 2^(bits-1) and the range is made symmetric, by GPTQ's rule (a group without a
               negative weight keeps 0 as its low end)
    scale      "minmax", or "mse": of 80 shrunken ranges the one with the least sum |q - w|^2.4
    scale_dtype  scales are rounded to it before use (float32, bfloat16, float16)

    The range always contains 0, so a pruned weight is exactly 0 and its code equals the zero.
    """

    bits: int
    group: int = 128
    symmetric: bool = False
    scale: str = "minmax"
    scale_dtype: torch.dtype = torch.float32
    static: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"bits must be 2 to 8, not {self.bits}")
        if self.group not in _GROUPS:
            raise InputError(f"group must be one of {_GROUPS} (0 = whole row), not {self.group}")
        if self.scale not in ("minmax", "mse"):
            raise InputError(f"scale must be 'minmax' or 'mse', not {self.scale!r}")
        if self.scale_dtype not in _SCALE_DTYPES:
            raise InputError(
                f"scale_dtype must be float32, bfloat16 or float16, not {self.scale_dtype}"
            )

    def width(self, cols: int) -> int:
        """Columns per grid in a matrix of ``cols`` columns."""
        return self.group or max(cols, 1)

    def dynamic(self) -> bool:
        """Whether grids are taken from the current weights during the sweep."""
        return self.group > 0 and not self.static

    def code(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest code of w (as a float), shapes broadcast."""
        return torch.clamp(torch.round(w / scale) + zero, 0, 2**self.bits - 1)

    def place(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of the ranges [low, high], in float64."""
        scale = (high - low) / (2**self.bits - 1)
        scale = scale.to(self.scale_dtype).double()
        smallest = 2.0**-24 if self.scale_dtype == torch.float16 else 2.0**-126
        scale = scale.clamp(smallest, torch.finfo(self.scale_dtype).max)
        if self.symmetric:
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        return scale, torch.round(-low / scale).clamp(0, 2**self.bits - 1)

    def grid(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Float64 reference: scale, zero of each row of w [rows, n], and whether that was clear."""
        zero = w.new_zeros(len(w))
        low, high = torch.minimum(w.amin(1), zero), torch.maximum(w.amax(1), zero)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = torch.where(low < 0, -high, low)
        empty = (low == 0) & (high == 0)
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        shrinks = [1 - i / 100 for i in range(80 if self.scale == "mse" else 1)]
        places = [self.place(p * low, p * high) for p in shrinks]
        costs = [
            (s[:, None] * (self.code(w, s[:, None], z[:, None]) - z[:, None]) - w).abs() ** 2.4
            for s, z in places
        ]
        least, best = torch.stack([cost.sum(1) for cost in costs]).sort(dim=0, stable=True)
        scale, zero = (torch.stack(x).gather(0, best[:1])[0] for x in zip(*places, strict=True))
        at = -low / (high - low) * (2**self.bits - 1)  # the zero before rounding
        clear = torch.full_like(empty, self.symmetric) | ((at - at.floor() - 0.5).abs() > 1e-4)
        if self.scale == "mse":
            clear &= (least[0] < least[1] * (1 - 1e-5)) | (best[0] == 0)
        return scale, zero, clear

    def options(self, cols: int) -> tuple[int, int, bool, bool, str]:
        """bits, columns per group, symmetric, mse, scale dtype: what the raw ops take."""
        dtype = _SCALE_DTYPES[self.scale_dtype]
        return self.bits, self.width(cols), self.symmetric, self.scale == "mse", dtype
