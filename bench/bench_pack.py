"""Packing and reading packed matrices at the shape of Aya-8B's down projection.

`Mweights/s` is what matters: all of an 8B model's weights pass through `test_pack` when it is
loaded, and through `test_dequantize` when its dense twin is made. `GB/s` counts each byte read and
written once, next to a plain copy (`test_ceiling_copy`). For one thread: OMP_NUM_THREADS=1.
"""

import pytest
import torch

from distaya_ext.ops import machine
from distaya_ext.ops import pack as P

ROWS, COLS = 4096, 14336
ROUNDS = {"rounds": 5, "warmup_rounds": 1}
CASES = [(kind, None) for kind in P.KINDS if kind != "int4-out"] + [("int4-out", (2, 4))]


def content(kind: str):
    """Codes that fit the kind, half of them pruned where it is sparse, and their scales."""
    rng = torch.Generator().manual_seed(0)
    bits = P.Format("int4" if kind == "int4-out" else kind, 0, 0).bits
    codes = torch.randint(0, 2**bits, (ROWS, COLS), generator=rng, dtype=torch.uint8)
    if kind == "int4-2:4":
        codes.view(ROWS, -1, 4)[..., 1:3] = 8
    elif kind == "int4-out":
        codes.view(-1, 4, COLS)[:, 1:3] = 8
    elif kind == "int4-mask":
        codes[torch.rand(ROWS, COLS, generator=rng) < 0.5] = 8
    return codes, torch.rand(ROWS, COLS // 128, generator=rng).bfloat16()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case[0])
def case(request):
    kind, nm = request.param
    codes, scales = content(kind)
    return codes, scales, P.pack(codes, scales, kind=kind, nm=nm)


def run(benchmark, moved: int, call, *args, **more):
    """Time call(...) and note the weights per second and the bandwidth they amount to."""
    benchmark.pedantic(call, args=args, kwargs=more, **ROUNDS)
    best = benchmark.stats.stats.min
    benchmark.extra_info["Mweights/s"] = round(ROWS * COLS / best * 1e-6)
    benchmark.extra_info["GB/s"] = round(moved / best * 1e-9, 2)
    benchmark.extra_info["threads"] = machine.threads()


def test_ceiling_copy(benchmark):
    """Read and write one byte per weight, into memory that is already there."""
    codes, _ = content("int4")
    run(benchmark, 2 * ROWS * COLS, torch.empty_like(codes).copy_, codes)


def test_pack(benchmark, case):
    """Codes to tiles; int4-mask reads the codes twice."""
    codes, scales, packed = case
    form = packed.format
    moved = codes.numel() * (1 + (form.kind == "int4-mask")) + packed.nbytes
    run(benchmark, moved, P.pack, codes, scales, kind=form.kind, nm=form.nm)


def test_unpack(benchmark, case):
    """Tiles to codes."""
    run(benchmark, case[0].numel() + case[2].nbytes, P.unpack, case[2])


def test_dequantize(benchmark, case):
    """Tiles to bf16."""
    run(benchmark, 2 * case[0].numel() + case[2].nbytes, P.dequantize, case[2])


def test_best_kind(benchmark, case):
    """What every packed layer is asked when it is loaded."""
    run(benchmark, case[0].numel(), P.best_kind, case[0])


@pytest.mark.parametrize("tokens", [1, 512])
def test_gather(benchmark, case, tokens):
    """Rows of an embedding; Mweights/s would count the whole matrix, so look at the time."""
    indices = torch.randint(0, ROWS, (tokens,), generator=torch.Generator().manual_seed(1))
    benchmark.pedantic(P.gather, args=(case[2], indices), **ROUNDS)
    benchmark.extra_info["Mweights/s"] = round(tokens * COLS / benchmark.stats.stats.min * 1e-6)


def torch_dequantize(codes, scales):
    """What torch needs for the same matrix from one byte per code."""
    shifted = codes.view(ROWS, -1, 128).to(torch.bfloat16) - 8
    return (shifted * scales[..., None]).view(ROWS, COLS)


def test_ruler_dequantize(benchmark):
    """Plain torch, from unpacked codes."""
    run(benchmark, 3 * ROWS * COLS, torch_dequantize, *content("int4"))
