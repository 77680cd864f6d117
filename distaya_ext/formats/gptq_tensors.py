"""GPTQ's tensors: qweight, qzeros, scales and g_idx, all with the inputs first.

qweight int32 [words(cols), rows] packs the codes along the inputs, qzeros int32 [groups,
words(rows)] the zeros along the rows, scales [groups, rows], g_idx int32 [cols]. The first version
stores every zero minus one, gptq_v2 stores the zero itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from . import bits
from .grid import Grid, groups
from .packed import check_order

if TYPE_CHECKING:
    from .module import ModuleScheme, Needs


def needs(scheme: ModuleScheme, rows: int, cols: int, dtype: torch.dtype) -> Needs:
    """See ModuleScheme.tensors."""
    count = groups(cols, scheme.group)
    return {
        "qweight": (torch.int32, (bits.words(cols, scheme.bits), rows)),
        "qzeros": (torch.int32, (count, bits.words(rows, scheme.bits))),
        "scales": (dtype, (count, rows)),
        "g_idx": (torch.int32, (cols,)),
    }


def decode(
    scheme: ModuleScheme, tensors: Mapping[str, Tensor], rows: int, cols: int, name: str
) -> Grid:
    """See ModuleScheme.decode."""
    check_order(tensors["g_idx"], scheme.group, f"{name}.g_idx")
    codes = bits.unpack(tensors["qweight"].T, scheme.bits, cols)
    stored = bits.unpack(tensors["qzeros"], scheme.bits, rows).T
    top = (1 << scheme.bits) - 1
    if scheme.offset and bool((stored == top).any()):
        row = int((stored == top).any(dim=1).nonzero()[0])
        raise InputError(
            f"{name}.qzeros holds {top} for row {row}, a zero of {top + 1} (or 0, to some readers) "
            f"in this version of the format; {scheme.bits} bits end at {top}"
        )
    zeros = (stored + scheme.offset).contiguous()
    middle = 1 << (scheme.bits - 1)
    if scheme.symmetric and bool((zeros != middle).any()):
        row = int((zeros != middle).any(dim=1).nonzero()[0])
        raise InputError(
            f"config.json calls the grids symmetric, but {name}.qzeros gives zero "
            f"{int(zeros[row][zeros[row] != middle][0])} in row {row} instead of {middle}"
        )
    scales = tensors["scales"].T.contiguous()
    return Grid(codes, scales, None if scheme.symmetric else zeros, scheme.bits, scheme.group)


def encode(scheme: ModuleScheme, grid: Grid) -> dict[str, Tensor]:
    """See ModuleScheme.encode. InputError for a zero of 0 in the first version of the format."""
    middle = torch.full_like(grid.scales, 1 << (scheme.bits - 1), dtype=torch.uint8)
    zeros = middle if grid.zeros is None else grid.zeros
    if scheme.offset and bool((zeros == 0).any()):
        raise InputError("a zero of 0 cannot be stored in GPTQ's first version; use gptq_v2")
    column = torch.arange(grid.cols)
    order = column // scheme.group if scheme.group else torch.zeros_like(column)
    return {
        "qweight": bits.pack(grid.codes, scheme.bits).T.contiguous(),
        "qzeros": bits.pack((zeros - scheme.offset).T.contiguous(), scheme.bits),
        "scales": grid.scales.T.contiguous(),
        "g_idx": order.to(torch.int32),
    }
