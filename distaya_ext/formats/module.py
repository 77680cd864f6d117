"""What the file holds for one quantised matrix, and the way between that and its codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from . import bitmask, gptq_tensors, packed
from .grid import SCALE_DTYPES, Grid

# What a file may hold under one suffix: dtype and shape; None where the length depends on the data.
Needs = dict[str, tuple[torch.dtype, tuple[int, ...] | None]]

_WAYS = {"pack-quantized": packed, "bitmask": bitmask, "gptq": gptq_tensors}
ENCODINGS = tuple(_WAYS)


@dataclass(frozen=True)
class ModuleScheme:
    """One matrix [rows, cols] in a file.

    bits       3, 4 or 8
    group      columns that share a scale: 32, 64, 128, or 0 for the whole row
    symmetric  the zero is 2^(bits-1) everywhere and (but for GPTQ) not stored
    encoding   "pack-quantized", "bitmask" (4 bits) or "gptq" (4 or 8 bits)
    kind, nm   the kernel layout to pack into when loading, None = the best for the codes found
    indexed    the file also holds the group of every column, which must be column // group
    offset     what is subtracted from zeros in the file: 1 in GPTQ's first version, else 0
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    encoding: str = "pack-quantized"
    kind: str | None = None
    nm: tuple[int, int] | None = None
    indexed: bool = False
    offset: int = 0

    def tensors(self, rows: int, cols: int, dtype: torch.dtype) -> Needs:
        """Suffix -> (dtype, shape) of all that the file must hold for a [rows, cols] matrix.

        dtype is that of the scales; a reader takes bfloat16, float16 and float32 there.
        """
        return _WAYS[self.encoding].needs(self, rows, cols, dtype)

    def check(self, found: Needs, rows: int, cols: int, name: str) -> None:
        """InputError unless dtypes and shapes (from a header or of tensors) are those needed."""
        wanted = self.tensors(rows, cols, torch.bfloat16)
        if missing := [suffix for suffix in wanted if suffix not in found]:
            raise InputError(f"{name} is quantised but {name}.{missing[0]} is absent")
        if extra := [suffix for suffix in found if suffix not in wanted]:
            raise InputError(f"{name}.{extra[0]} does not belong to a {self.encoding} matrix")
        for suffix, (dtype, shape) in wanted.items():
            has, size = found[suffix]
            dtypes = SCALE_DTYPES if dtype.is_floating_point else (dtype,)
            if has not in dtypes:
                raise InputError(
                    f"tensor {name}.{suffix} is {_short(has)}; {' or '.join(map(_short, dtypes))} "
                    "is needed"
                )
            fits = len(size) == 1 if shape is None else tuple(size) == shape
            if not fits:
                need = "one dimension" if shape is None else f"shape {_size(shape)}"
                raise InputError(
                    f"tensor {name}.{suffix} has shape {_size(size)}; a {rows}x{cols} matrix of "
                    f"{self.bits} bits per {self.group or cols} inputs needs {need}"
                )

    def decode(self, tensors: Mapping[str, Tensor], rows: int, cols: int, name: str) -> Grid:
        """Codes, scales and zeros out of the tensors by suffix. InputError on anything hostile."""
        found = {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()}
        self.check(found, rows, cols, name)
        return _WAYS[self.encoding].decode(self, tensors, rows, cols, name).check(name)

    def encode(self, grid: Grid) -> dict[str, Tensor]:
        """Tensors by suffix. InputError when the grid is not of this scheme."""
        self.check_grid(grid)
        return self.encoded(grid.check("the matrix"))

    def encoded(self, grid: Grid) -> dict[str, Tensor]:
        """encode of a grid that the caller checks."""
        return _WAYS[self.encoding].encode(self, grid)

    def check_grid(self, grid: Grid) -> None:
        """InputError when the grid is not of this scheme; no value is read."""
        if (grid.bits, grid.group, grid.symmetric) != (self.bits, self.group, self.symmetric):
            raise InputError(
                f"a matrix of {grid.bits} bits, group {grid.group}, symmetric {grid.symmetric} "
                f"cannot be stored as {self.bits} bits, group {self.group}, symmetric "
                f"{self.symmetric}"
            )

    def nbytes(self, rows: int, cols: int, dtype: torch.dtype, kept: int | None = None) -> int:
        """Bytes of all tensors; bitmask needs to know how many weights are kept."""
        total = 0
        for size_dtype, shape in self.tensors(rows, cols, dtype).values():
            values = -(-(rows * cols if kept is None else kept) // 2)
            count = values if shape is None else math.prod(shape)
            total += count * size_dtype.itemsize
        return total


def _short(dtype: torch.dtype | None) -> str:
    return "of an unknown type" if dtype is None else str(dtype).removeprefix("torch.")


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
