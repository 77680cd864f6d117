"""Random content that fits each kind of packed matrix."""

import itertools

import torch

from distaya_ext.ops import pack as P

CASES = [(kind, None) for kind in P.KINDS if kind != "int4-out"]
CASES += [("int4-out", nm) for nm in ((1, 2), (2, 4), (4, 8), (1, 16), (11, 16))]
GRIDS = list(itertools.product((32, 64, 128, 0), (True, False), P.SCALES))
SHAPES = [(0, 0), (3, 0), (0, 5), (1, 1), (1, 300), (130, 1), (64, 128), (65, 129), (70, 283)]


def keep(cols: int, n: int, m: int, rng: torch.Generator, rows: int) -> torch.Tensor:
    """bool [rows, cols]: n random survivors of every m columns (fewer in a short last group)."""
    groups = -(-cols // m)
    rank = torch.rand(rows, groups, m, generator=rng).argsort(-1).argsort(-1)
    return (rank < n).reshape(rows, groups * m)[:, :cols]


def content(kind, rows, cols, group=128, symmetric=True, dtype=torch.bfloat16, nm=None, seed=0):
    """Random codes that fit the kind, scales and zeros."""
    rng = torch.Generator().manual_seed(seed)
    form = P.Format(kind, rows, cols, group, symmetric, dtype, nm)
    top = 2**form.bits
    codes = torch.randint(0, top, (rows, cols), generator=rng, dtype=torch.uint8)
    scales = torch.randn(rows, form.groups, generator=rng).to(dtype)
    zeros = torch.randint(0, top, scales.shape, generator=rng, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(top // 2)
    kept = torch.ones(rows, cols, dtype=torch.bool)
    if kind == "int4-mask":
        kept = torch.rand(rows, cols, generator=rng) < 0.5
    elif kind == "int4-2:4":
        kept = keep(cols, 2, 4, rng, rows)
    elif nm is not None:
        kept = keep(rows, *nm, rng, cols).t()
    codes = torch.where(kept, codes, wide(zeros, group, cols)).contiguous()
    return codes, scales, None if symmetric else zeros


def wide(grid: torch.Tensor, group: int, cols: int) -> torch.Tensor:
    return grid.repeat_interleave(group or max(cols, 1), 1)[:, :cols]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = [x.contiguous().view(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)
