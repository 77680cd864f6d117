"""Quantised matrices packed into the tiles that all kernels read, and read back from them.

A matrix is codes uint8 [rows, cols], scales [rows, groups] and zeros uint8 [rows, groups] (None:
symmetric, zero = 2^(bits-1)); weight = scale * (code - zero). A weight whose code equals its zero
is exactly 0 and counts as pruned: the sparse kinds do not store it. Where every bit lies:
csrc/pack/layout.h. One layout serves CPU and CUDA, so moving a packed matrix is a plain copy.

    int4, int3, int8   dense
    int4-2:4           at most 2 kept of every 4 consecutive columns of a row
    int4-mask          any pattern: 1 bit per weight, then the kept codes
    int4-out           at most n kept of every m consecutive rows of a column (nm = (n, m))
"""

from __future__ import annotations

import torch
from torch import Tensor

from distaya_ext import _C
from distaya_ext._op import op
from distaya_ext.errors import InputError
from distaya_ext.ops import obs
from distaya_ext.packed import (
    DENSE_BODY,
    GROUPS,
    MASK_BYTES,
    SCALES,
    TILE_COLS,
    TILE_ROWS,
    Format,
    PackedWeight,
    ceil_div,
)
from distaya_ext.packed import KINDS as KINDS
from distaya_ext.quant import Quant

# ---- raw ops ----


def _groups(spec: list[int]) -> int:
    return ceil_div(spec[2], spec[3]) if spec[3] else 1


def _fake_survey(codes: Tensor, zeros: Tensor | None, spec: list[int]) -> Tensor:
    tiles = ceil_div(spec[1], TILE_ROWS) * ceil_div(spec[2], TILE_COLS)
    return codes.new_empty(tiles, 4, dtype=torch.int64)


@op(fake=_fake_survey)
def pack_survey(codes: Tensor, zeros: Tensor | None, spec: list[int]) -> Tensor:
    """int64 [tiles, 4], see ``survey``."""
    out = _fake_survey(codes, zeros, spec)
    _C.pack_survey(codes, zeros, spec, out)
    return out


def _fake_write(codes: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    bad = codes.new_empty(5, dtype=torch.int64)
    return codes.new_empty(others[-1], dtype=torch.uint8), bad


@op(fake=_fake_write)
def pack_write(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor | None,
    spec: list[int],
    nbytes: int,
) -> tuple[Tensor, Tensor]:
    """The buffer, and int64 [5]: where content does not fit, or -1 (csrc/pack/pack.h)."""
    data = codes.new_empty(nbytes, dtype=torch.uint8)
    bad = torch.full((5,), -1, dtype=torch.int64, device=codes.device)
    _C.pack_write(codes, scales, zeros, offsets, spec, data, bad)
    return data, bad


def _fake_read(data: Tensor, spec: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    rows, groups = spec[1], _groups(spec)
    codes = data.new_empty(rows, spec[2])
    scales = data.new_empty(rows, groups, dtype=SCALES[spec[5]])
    return codes, scales, data.new_empty(0, 0) if spec[4] else data.new_empty(rows, groups)


@op(fake=_fake_read)
def pack_read(data: Tensor, spec: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """codes, scales, and zeros ([0, 0] when symmetric)."""
    codes, scales, zeros = _fake_read(data, spec)
    _C.pack_read(data, spec, codes, scales, None if spec[4] else zeros)
    return codes, scales, zeros


def _fake_dequantize(
    data: Tensor, spec: list[int], first: int, count: int, dtype: torch.dtype
) -> Tensor:
    return data.new_empty(count, spec[2], dtype=dtype)


@op(fake=_fake_dequantize)
def pack_dequantize(
    data: Tensor, spec: list[int], first: int, count: int, dtype: torch.dtype
) -> Tensor:
    """Rows [first, first + count) as floats [count, cols]; first is a multiple of 64."""
    W = data.new_empty(count, spec[2], dtype=dtype)
    _C.pack_dequantize(data, spec, first, W)
    return W


def _fake_gather(data: Tensor, spec: list[int], indices: Tensor, dtype: torch.dtype) -> Tensor:
    return data.new_empty(*indices.shape, spec[2], dtype=dtype)


@op(fake=_fake_gather)
def pack_gather(data: Tensor, spec: list[int], indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows named by indices int64 [...] as floats [..., cols]."""
    W = _fake_gather(data, spec, indices, dtype)
    flat = indices.reshape(-1).contiguous()
    _C.pack_gather(data, spec, flat, W.view(flat.numel(), spec[2]))
    return W


# ---- the room ----


def _need_2d(codes: Tensor) -> None:
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        kind = str(codes.dtype).removeprefix("torch.")
        raise InputError(f"codes must be uint8 [rows, cols] but are {kind} {list(codes.shape)}")


def pack(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    kind: str = "int4",
    group: int = 128,
    nm: tuple[int, int] | None = None,
) -> PackedWeight:
    """Pack codes uint8 [rows, cols] with their grids. Exact: ``unpack`` gives them back bitwise.

    scales: float32, bfloat16 or float16 [rows, groups], finite. zeros: uint8 [rows, groups], or
    None for a symmetric matrix (zero = 2^(bits-1)). All contiguous, on one device.
    Raises ValueError, with its row and column, for a code or zero with more bits than the kind, a
    scale that is not finite and a group that keeps more than the kind allows; and for shapes,
    dtypes and devices that do not fit.
    """
    _need_2d(codes)
    rows, cols = codes.shape
    form = Format(kind, rows, cols, group, zeros is None, scales.dtype, nm)
    spec, offsets, nbytes = form.spec(), None, form.nbytes
    if nbytes is None:
        # Step one of two: how long each record is. Then their running sum, then the records.
        values = pack_survey(codes, zeros, spec)[:, 0]
        ends = ((form.record_bytes + values + 15) // 16 * 16).cumsum(0) + form.offsets_bytes
        offsets = torch.cat([ends.new_full((1,), form.offsets_bytes), ends])
        nbytes = int(offsets[-1]) + form.ending_bytes
    data, bad = pack_write(codes, scales, zeros, offsets, spec, nbytes)
    if torch.compiler.is_compiling():  # no host read inside a graph: the graph itself asserts
        torch._assert_async((bad < 0).all(), f"codes, scales or zeros do not fit {kind}")
    else:
        _need_good(bad.tolist(), codes, scales, zeros, form)
    return PackedWeight(data, form)


def _need_good(
    bad: list[int], codes: Tensor, scales: Tensor, zeros: Tensor | None, form: Format
) -> None:
    if max(bad) < 0:
        return
    code, pattern, zero, scale, record = bad
    if code >= 0:
        row, column = divmod(code, form.cols)
        value, most = int(codes[row, column]), 2**form.bits - 1
        raise InputError(
            f"the code at row {row}, column {column} is {value} but {form.kind} holds 0 to {most}"
        )
    if zero >= 0 and zeros is not None:
        row, group = divmod(zero, form.groups)
        value, most = int(zeros[row, group]), 2**form.bits - 1
        raise InputError(
            f"the zero of row {row}, group {group} is {value} but {form.kind} holds 0 to {most}"
        )
    if scale >= 0:
        row, group = divmod(scale, form.groups)
        raise InputError(
            f"the scale of row {row}, group {group} is {float(scales[row, group])}, not finite"
        )
    if pattern >= 0:
        row, column = divmod(pattern, form.cols)
        if form.nm is not None:
            n, m = form.nm
            last = min(row + m, form.rows) - 1
            where, of = f"rows {row} to {last} of column {column}", f"{m} rows"
        else:
            n, last = 2, min(column + 4, form.cols) - 1
            where, of = f"columns {column} to {last} of row {row}", "4 columns"
        raise InputError(f"{form.kind} keeps at most {n} of every {of} but {where} keep more")
    raise InputError(f"the record of tile {record} is not as long as its offsets say")


def unpack(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scales, zeros or None): the exact inverse of ``pack``.

    Raises ValueError when the buffer is not what its format says.
    """
    codes, scales, zeros = pack_read(packed.data, packed.format.spec())
    return codes, scales, None if packed.format.symmetric else zeros


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """W [rows, cols] = float32(scale) * (code - zero), rounded to dtype (fp32, bf16 or fp16).

    Raises ValueError when the buffer is not what its format says, and for another dtype.
    """
    return pack_dequantize(packed.data, packed.format.spec(), 0, packed.format.rows, dtype)


def gather(packed: PackedWeight, indices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of the matrix, as an embedding reads them: [..., cols] for indices int64 [...].

    Raises ValueError for an index that is no row. On CUDA, where raising would mean waiting for
    the GPU, such an index gives a row of NaN instead.
    """
    return pack_gather(packed.data, packed.format.spec(), indices, dtype)


def survey(codes: Tensor, zeros: Tensor | None = None, group: int | None = None) -> Tensor:
    """What 4-bit codes would take as a sparse kind: int64 [tiles, 4], tiles of 64 x 128 row by row.

    The columns: bytes of kept codes as int4-mask stores them; and the most weights kept of any 4
    consecutive columns, of any 4 and of any 8 consecutive rows. group: None infers it from zeros.
    """
    _need_2d(codes)
    if group is None:
        group = _infer_group(codes, zeros)
    form = Format("int4", *codes.shape, group, zeros is None)
    return pack_survey(codes, zeros, form.spec())


def _infer_group(codes: Tensor, grid: Tensor | None) -> int:
    """The group that gives a grid [rows, groups]; more than one group allows only one answer."""
    if grid is None or grid.shape[-1] == 1:
        return 0
    for group in GROUPS[1:]:
        if grid.shape[-1] == ceil_div(codes.shape[1], group):
            return group
    raise InputError(
        f"grids {list(grid.shape)} fit no group of 32, 64 or 128 of codes {list(codes.shape)}"
    )


def best_kind(codes: Tensor, zeros: Tensor | None = None) -> tuple[str, tuple[int, int] | None]:
    """(kind, nm) of the kind that suits these 4-bit codes uint8 [rows, cols]: small, fast to read.

    int4-2:4 where it fits, else int4-out with (2, 4) or (4, 8), else int4-mask where that is
    smaller than int4, else int4. Raises ValueError for shapes that do not fit.
    """
    return kind_of(kind_facts(codes, zeros), codes.numel())


def kind_facts(codes: Tensor, zeros: Tensor | None = None) -> Tensor:
    """What best_kind decides by, int64 [6] on the device of the codes, without waiting for it:
    the most kept of 4 columns, of 4 rows, of 8 rows; bytes as int4-mask and as int4; bytes of codes
    that int4-mask would keep. Of nothing, zeros.
    """
    found = survey(codes, zeros)
    if not len(found):
        return found.new_zeros(6)
    values = found[:, 0]
    # 8 bytes of offset, and a record is filled up to 16.
    masked = ((values + MASK_BYTES + 15) // 16 * 16 + 8).sum()
    dense = masked.new_full((), DENSE_BODY["int4"] * len(found))
    return torch.cat([found[:, 1:].amax(0), torch.stack([masked, dense, values.sum()])])


def kind_of(facts: Tensor, weights: int) -> tuple[str, tuple[int, int] | None]:
    """best_kind of so many weights, from their kind_facts."""
    if not weights:
        return "int4", None
    columns, rows4, rows8, masked, dense, values = facts.tolist()
    if columns <= 2:
        return "int4-2:4", None
    if rows4 <= 2:
        return "int4-out", (2, 4)
    if rows8 <= 4:
        return "int4-out", (4, 8)
    # Padding, which costs only int4, is no reason to mask a matrix that is not pruned: hence the
    # second condition, on real weights.
    return ("int4-mask" if masked < dense and values < weights * 3 / 8 else "int4"), None


def from_dense(
    W: Tensor, quant: Quant, *, kind: str = "int4", nm: tuple[int, int] | None = None
) -> PackedWeight:
    """Round W [rows, cols] to the nearest codes of ``quant`` (``obs.quantize``) and pack them.

    0 and -0.0 become exactly 0, so a pruned W fits the sparse kinds it was pruned for. quant.bits
    must be those of the kind; scales are kept in quant.scale_dtype. W float32, bfloat16 or float16.
    Raises ValueError for what does not fit.
    """
    if W.dim() != 2:
        raise InputError(f"W must be [rows, cols] but has shape {list(W.shape)}")
    form = Format(kind, *W.shape, quant.group, quant.symmetric, quant.scale_dtype, nm)
    if quant.bits != form.bits:
        raise InputError(
            f"kind {kind} has codes of {form.bits} bits but quant asks for {quant.bits}"
        )
    _, codes, scales, zeros = obs.quantize(W, quant)
    points = None if quant.symmetric else zeros.to(torch.uint8)
    return pack(codes, scales.to(quant.scale_dtype), points, kind=kind, group=quant.group, nm=nm)


def reference_dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None = None, *, bits: int = 4
) -> Tensor:
    """scale * (code - zero) in plain torch float64 [rows, cols]; bits matter when zeros is None."""
    cols = codes.shape[1]
    width = _infer_group(codes, scales) or max(cols, 1)
    wide = scales.double().repeat_interleave(width, 1)[:, :cols]
    if zeros is None:
        return wide * (codes.double() - 2 ** (bits - 1))
    return wide * (codes.double() - zeros.double().repeat_interleave(width, 1)[:, :cols])
