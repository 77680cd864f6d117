"""Encoding a grid on a GPU without waiting for it.

start() queues the work. What a file cannot know before the values are known comes along under names
that begin with a question mark: the largest code and zero of every row, and how many weights a
bitmask keeps. Once all of it is on the host, finish() looks at that and gives the tensors of the
file, bit for bit those of ModuleScheme.encode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import bitmask, packed
from .grid import Grid, check_range, check_scales
from .module import ModuleScheme

_BLOCK = 1 << 24  # weights whose places are computed at once, in int64


def start(scheme: ModuleScheme, grid: Grid) -> dict[str, Tensor]:
    """Tensors by suffix, on the device of the grid; no value is read."""
    scheme.check_grid(grid)
    grid.check_form("the matrix")
    found = {"?codes": _most(grid.codes)}
    if grid.zeros is not None:
        found["?zeros"] = _most(grid.zeros)
    if scheme.encoding != "bitmask":
        return {**scheme.encoded(grid), **found}
    kept = grid.kept()
    values, count = compact(grid.codes, kept)
    return {
        "weight_mask": bitmask.mask(kept),
        "weight_values": values,
        **packed.encode_frame(scheme, grid),
        "?kept": count,
        **found,
    }


def finish(scheme: ModuleScheme, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the file by suffix, from those of start on the host. InputError as encode."""
    check_range(tensors["?codes"], scheme.bits, "codes of the matrix")
    if "?zeros" in tensors:
        check_range(tensors["?zeros"], scheme.bits, "zeros of the matrix")
    check_scales(tensors["weight_scale"], "the matrix")
    found = {suffix: tensor for suffix, tensor in tensors.items() if not suffix.startswith("?")}
    if "?kept" in tensors:
        # A copy, since a view would hold the memory of all weights until the file is written.
        found["weight_values"] = found["weight_values"][: (kept(tensors) + 1) // 2].clone()
    return found


def kept(tensors: dict[str, Tensor]) -> int:
    """Weights that a bitmask keeps, from the tensors of start on the host."""
    return int(tensors["?kept"])


def compact(codes: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of kept weights row by row, two to a byte, low nibble first, and their number.

    codes uint8, kept bool, both [rows, cols]. uint8 [ceil(rows * cols / 2)], of which what is
    needed is filled, a last high nibble with 0; int64 []. Without reading how many are kept: every
    weight's place is a running sum, and the others go to a place behind the last.
    """
    weights = codes.numel()
    out = codes.new_zeros(weights + weights % 2 + 1)
    count = torch.zeros((), dtype=torch.int64, device=codes.device)
    for values, mask in zip(
        codes.flatten().split(_BLOCK), kept.flatten().split(_BLOCK), strict=True
    ):
        place = mask.cumsum(0).add_(count - 1)
        count = place[-1] + 1
        out.scatter_(0, place.masked_fill_(~mask, len(out) - 1), values)
    out = out[:-1]
    return out[::2] | (out[1::2] << 4), count


def _most(values: Tensor) -> Tensor:
    return values.amax(dim=1, keepdim=True) if values.numel() else values
