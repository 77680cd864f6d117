"""A quantised matrix as numbers: codes, scales and zeros, before any file or kernel packs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import FLOATS
from ..errors import InputError
from ..finite import all_finite

SCALE_DTYPES = tuple(FLOATS.values())
_BLOCK = 1 << 22  # weights made dense at once in float32


@dataclass(frozen=True)
class Grid:
    """weight = scale * (code - zero).

    codes   uint8 [rows, cols], below 2^bits
    scales  bfloat16, float16 or float32 [rows, groups], finite and not negative
    zeros   uint8 [rows, groups], below 2^bits, or None: 2^(bits-1) everywhere (symmetric)
    group   columns that share a scale, 0 = the whole row; the last group may be shorter
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int = 4
    group: int = 128

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def cols(self) -> int:
        return self.codes.shape[1]

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    def check(self, name: str) -> Grid:
        """Itself, or InputError when a dtype, shape, code, zero or scale cannot be."""
        self.check_form(name)
        check_range(self.codes, self.bits, f"codes of {name}")
        if self.zeros is not None:
            check_range(self.zeros, self.bits, f"zeros of {name}")
        check_scales(self.scales, name)
        return self

    def check_form(self, name: str) -> None:
        """InputError when a dtype or shape cannot be; no value is read."""
        shape = (self.rows, groups(self.cols, self.group))
        if self.codes.dtype != torch.uint8 or self.scales.dtype not in SCALE_DTYPES:
            raise InputError(
                f"the codes of {name} are {self.codes.dtype} and its scales {self.scales.dtype}; "
                "uint8 and bfloat16, float16 or float32 are needed"
            )
        if self.scales.shape != shape or (self.zeros is not None and self.zeros.shape != shape):
            zeros = "" if self.zeros is None else f" and zeros {list(self.zeros.shape)}"
            raise InputError(
                f"{name} of {self.rows}x{self.cols} needs scales {list(shape)}; it has "
                f"{list(self.scales.shape)}{zeros}"
            )

    def centred(self) -> Tensor:
        """code - zero, int16 [rows, cols]: 0 exactly where the weight is 0."""
        if self.zeros is None:
            return self.codes.to(torch.int16) - (1 << (self.bits - 1))
        return self.codes.to(torch.int16) - self.spread(self.zeros.to(torch.int16))

    def kept(self) -> Tensor:
        """bool [rows, cols]: the weight is not 0."""
        zero = 1 << (self.bits - 1) if self.zeros is None else self.spread(self.zeros)
        return self.codes != zero

    def spread(self, per_group: Tensor) -> Tensor:
        """[rows, groups] -> [rows, cols]."""
        if per_group.shape[1] == 1:
            return per_group.expand(-1, self.cols)
        return per_group.repeat_interleave(self.group, dim=1)[:, : self.cols]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weights [rows, cols], computed in float32 and rounded to dtype once."""
        out = torch.empty(self.rows, self.cols, dtype=dtype)
        step = max(1, _BLOCK // max(1, self.cols))
        for start in range(0, self.rows, step):
            part = self.part(start, start + step)
            out[start : start + step] = part.spread(part.scales.float()) * part.centred()
        return out

    def to(self, device: str | torch.device) -> Grid:
        """The same on another device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return Grid(self.codes.to(device), self.scales.to(device), zeros, self.bits, self.group)

    def part(self, start: int, stop: int) -> Grid:
        """Some of the rows."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        rows = slice(start, stop)
        return Grid(self.codes[rows], self.scales[rows], zeros, self.bits, self.group)


def groups(cols: int, group: int) -> int:
    """Scales of a row of `cols` columns."""
    return -(-cols // group) if group else 1


def check_range(values: Tensor, bits: int, what: str) -> None:
    """InputError unless all values are below 2^bits; it names the first row that fails."""
    most = int(values.max()) if values.numel() else 0
    if most >= 1 << bits:
        row = int((values >= 1 << bits).any(dim=1).nonzero()[0])
        raise InputError(f"the {what} reach {most} in row {row}; {bits} bits end at {2**bits - 1}")


def check_scales(scales: Tensor, name: str) -> None:
    """InputError when a scale is NaN, infinite or negative; it names the row."""
    if not all_finite(scales):
        row = int((~torch.isfinite(scales)).any(dim=1).nonzero()[0])
        raise InputError(f"the scales of {name} hold NaN or infinity, first in row {row}")
    if scales.numel() and float(scales.min()) < 0:
        row = int((scales < 0).any(dim=1).nonzero()[0])
        raise InputError(f"the scales of {name} are negative, first in row {row}")
