"""Scores and masks at the shape of Aya-8B's down projection, next to torch's own way.

Memory-bound work: `GB/s` is bytes read and written once over the fastest round, next to what a
plain copy of the same matrix reaches (`test_ceiling_copy`). For one thread: OMP_NUM_THREADS=1.
"""

import pytest
import torch

from distaya_ext.ops import machine
from distaya_ext.ops import mask as M

ROWS, COLS = 4096, 14336
ROUNDS = {"rounds": 3, "warmup_rounds": 1}


@pytest.fixture(scope="module")
def W():
    return torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture(scope="module")
def norms():
    return torch.rand(COLS, generator=torch.Generator().manual_seed(1)) + 0.1


@pytest.fixture(scope="module")
def scores(W, norms):
    return M.wanda(W, norms)


def run(benchmark, bytes_per_weight: float, call, *args):
    """Time call(*args) and note the bandwidth it amounts to."""
    benchmark.pedantic(call, args=args, **ROUNDS)
    least = ROWS * COLS * bytes_per_weight
    benchmark.extra_info["GB/s"] = round(least / benchmark.stats.stats.min * 1e-9, 2)
    benchmark.extra_info["threads"] = machine.threads()
    benchmark.extra_info["peak fp32 Gflop/s"] = round(machine.peak()["fp32"])


def test_ceiling_copy(benchmark, scores):
    """Read 4 bytes and write 4 bytes per weight, into memory that is already there."""
    out = torch.empty_like(scores)
    run(benchmark, 8, out.copy_, scores)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
def test_score(benchmark, W, norms, method):
    """bf16 weights to fp32 scores; RIA reads the weights twice."""
    read = 4 if method == "ria" else 2
    args = (W,) if method == "magnitude" else (W, norms)
    run(benchmark, read + 4, getattr(M, method), *args)


@pytest.mark.parametrize("along", ["row", "column", "matrix"])
def test_keep_half(benchmark, scores, along):
    """Exactly half of each group."""
    size = {"row": COLS, "column": ROWS, "matrix": ROWS * COLS}[along]
    run(benchmark, 5, M.keep_k, scores, size // 2, along)


@pytest.mark.parametrize("along", ["inputs", "outputs"])
@pytest.mark.parametrize("nm", [(2, 4), (4, 8), (16, 32)], ids="{0[0]}:{0[1]}".format)
def test_keep_nm(benchmark, scores, nm, along):
    """N of every M."""
    run(benchmark, 5, M.keep_nm, scores, *nm, along)


def torch_keep_half(scores):
    """The tuned torch way: the k-th value of each row, then a comparison (ties not exact)."""
    return scores > scores.kthvalue(COLS // 2, dim=1, keepdim=True).values


def torch_keep_half_by_sort(scores):
    """The published way: sort each row, scatter the first half's indices."""
    order = scores.sort(dim=1, stable=True, descending=True).indices[:, : COLS // 2]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def torch_keep_2_4(scores):
    """The published way: topk of each group, scattered."""
    groups = scores.view(-1, 4)
    best = groups.topk(2, dim=1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, best, True).view(ROWS, COLS)


@pytest.mark.parametrize("way", [torch_keep_half, torch_keep_half_by_sort, torch_keep_2_4])
def test_ruler(benchmark, scores, way):
    """What torch needs for the same masks."""
    benchmark.pedantic(way, args=(scores,), rounds=1)
    benchmark.extra_info["threads"] = machine.threads()
