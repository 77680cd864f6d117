"""Our own encoding of pruned 4-bit matrices: one bit per weight, then the kept codes.

weight_mask uint8 [rows, ceil(cols / 8)], bit k % 8 of byte k // 8 tells whether column k is kept,
bits past the last column are 0; weight_values uint8 [ceil(kept / 2)], the codes of the kept weights
row by row, two to a byte, low nibble first; the rest as in packed.py. A weight that is not kept has
its group's zero as code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from . import packed
from .grid import Grid, groups

if TYPE_CHECKING:
    from .module import ModuleScheme, Needs

# The eight bits of every byte as eight bytes of 0 or 1, in one int64 each.
_EIGHT = (torch.arange(256)[:, None] >> torch.arange(8) & 1).to(torch.uint8).view(torch.int64)[:, 0]


def needs(scheme: ModuleScheme, rows: int, cols: int, dtype: torch.dtype) -> Needs:
    """See ModuleScheme.tensors."""
    return {
        "weight_mask": (torch.uint8, (rows, -(-cols // 8))),
        "weight_values": (torch.uint8, None),
        **packed.frame(scheme, rows, cols, dtype),
    }


def decode(
    scheme: ModuleScheme, tensors: Mapping[str, Tensor], rows: int, cols: int, name: str
) -> Grid:
    """See ModuleScheme.decode."""
    every = _EIGHT[tensors["weight_mask"].contiguous().long()].view(torch.bool).view(rows, -1)
    if bool(every[:, cols:].any()):
        row = int(every[:, cols:].any(dim=1).nonzero()[0])
        raise InputError(f"{name}.weight_mask keeps columns past {cols} in row {row}")
    kept = every[:, :cols]
    values = tensors["weight_values"]
    count = int(kept.count_nonzero())
    if len(values) != -(-count // 2):
        raise InputError(
            f"{name}.weight_mask keeps {count} weights, which take {-(-count // 2)} bytes of "
            f"weight_values; it has {len(values)}"
        )
    zero = torch.full((rows, groups(cols, scheme.group)), 1 << (scheme.bits - 1)).to(torch.uint8)
    grid = packed.finish(scheme, torch.empty(rows, cols, dtype=torch.uint8), tensors, name)
    zeros = grid.spread(zero if grid.zeros is None else grid.zeros)
    codes = zeros.clone(memory_format=torch.contiguous_format)
    codes.masked_scatter_(kept, torch.stack((values & 15, values >> 4), dim=1).view(-1))
    return Grid(codes, grid.scales, grid.zeros, grid.bits, grid.group)


def encode(scheme: ModuleScheme, grid: Grid) -> dict[str, Tensor]:
    """See ModuleScheme.encode. Weights whose code is the zero are not kept."""
    kept = grid.kept()
    codes = grid.codes.masked_select(kept)
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    return {
        "weight_mask": mask(kept),
        "weight_values": codes[::2] | (codes[1::2] << 4),
        **packed.encode_frame(scheme, grid),
    }


def mask(kept: Tensor) -> Tensor:
    """weight_mask of kept, bool [rows, cols]."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 8))
    # Eight bytes of 0 or 1 as one int64: the product moves byte i to bit 56 + i, without carries.
    return ((padded.view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8)
