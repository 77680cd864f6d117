"""compressed-tensors' pack-quantized: codes dense in int32 along the inputs, zeros along the rows.

weight_packed int32 [rows, words(cols)], weight_scale [rows, groups], weight_shape int64 [2], and
where the grid is not symmetric weight_zero_point int32 [words(rows), groups].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from . import bits
from .grid import Grid, groups

if TYPE_CHECKING:
    from .module import ModuleScheme, Needs


def needs(scheme: ModuleScheme, rows: int, cols: int, dtype: torch.dtype) -> Needs:
    """See ModuleScheme.tensors."""
    packed = (torch.int32, (rows, bits.words(cols, scheme.bits)))
    return {"weight_packed": packed, **frame(scheme, rows, cols, dtype)}


def frame(scheme: ModuleScheme, rows: int, cols: int, dtype: torch.dtype) -> Needs:
    """What every encoding but GPTQ's has beside the codes."""
    count = groups(cols, scheme.group)
    found: Needs = {"weight_scale": (dtype, (rows, count)), "weight_shape": (torch.int64, (2,))}
    if not scheme.symmetric:
        found["weight_zero_point"] = (torch.int32, (bits.words(rows, scheme.bits), count))
    if scheme.indexed:
        found["weight_g_idx"] = (torch.int32, (cols,))
    return found


def decode(
    scheme: ModuleScheme, tensors: Mapping[str, Tensor], rows: int, cols: int, name: str
) -> Grid:
    """See ModuleScheme.decode."""
    codes = bits.unpack(tensors["weight_packed"], scheme.bits, cols)
    return finish(scheme, codes, tensors, name)


def finish(scheme: ModuleScheme, codes: Tensor, tensors: Mapping[str, Tensor], name: str) -> Grid:
    """The grid of the codes [rows, cols] with the scales and zeros of the frame."""
    check_shape(tensors, tuple(codes.shape), name)
    if scheme.indexed:
        check_order(tensors["weight_g_idx"], scheme.group, f"{name}.weight_g_idx")
    zeros = None
    if not scheme.symmetric:
        along_rows = tensors["weight_zero_point"].T
        zeros = bits.unpack(along_rows, scheme.bits, len(codes)).T.contiguous()
    return Grid(codes, tensors["weight_scale"], zeros, scheme.bits, scheme.group)


def check_shape(tensors: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> None:
    """InputError when weight_shape tells another size than the model of config.json."""
    told = tensors["weight_shape"].tolist()
    if told != list(shape):
        raise InputError(
            f"{name}.weight_shape says {told[0]}x{told[1]}; config.json asks for "
            f"{shape[0]}x{shape[1]}"
        )


def check_order(g_idx: Tensor, group: int, what: str) -> None:
    """InputError unless g_idx [cols] is column // group: other orders have no kernel."""
    column = torch.arange(len(g_idx), device=g_idx.device)
    wanted = column // group if group else torch.zeros_like(column)
    if not torch.equal(g_idx.long(), wanted):
        at = int((g_idx.long() != wanted).nonzero()[0])
        raise InputError(
            f"{what} puts column {at} into group {int(g_idx[at])} instead of {int(wanted[at])}; "
            "columns in activation order (desc_act) are not supported"
        )


def encode(scheme: ModuleScheme, grid: Grid) -> dict[str, Tensor]:
    """See ModuleScheme.encode."""
    return {"weight_packed": bits.pack(grid.codes, scheme.bits), **encode_frame(scheme, grid)}


def encode_frame(scheme: ModuleScheme, grid: Grid) -> dict[str, Tensor]:
    """Scales, shape and zeros."""
    found = {
        "weight_scale": grid.scales.contiguous(),
        "weight_shape": torch.tensor(grid.codes.shape, dtype=torch.int64),
    }
    if grid.zeros is not None:
        found["weight_zero_point"] = bits.pack(
            grid.zeros.T.contiguous(), scheme.bits
        ).T.contiguous()
    if scheme.indexed:
        column = torch.arange(grid.cols)
        order = column // scheme.group if scheme.group else torch.zeros_like(column)
        found["weight_g_idx"] = order.to(torch.int32)
    return found
