"""H += X^T X at Aya-8B's inputs (4096: attention, gate, up; 14336: down), next to torch's way.

Useful Gflop/s counts the upper triangle only, T C (C + 1), beside the measured peak of one thread;
torch's full product is counted the same way. G += Y^T X of K by C columns has 2 T K C to do, all of
it useful; K = 4096 by C = 14336 is down's output by its input. For one thread: OMP_NUM_THREADS=1.
"""

import pytest
import torch

from distaya_ext.ops import machine
from distaya_ext.ops.hessian import column_sq_, cross_, hessian_, symmetrize_

HIDDEN, FF = 4096, 14336
CROSS = [(2048, HIDDEN, HIDDEN), (512, HIDDEN, FF)]  # tokens, columns of Y, columns of X
ROUNDS = {"rounds": 3, "warmup_rounds": 1}


def activations(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def note_flops(benchmark, X: torch.Tensor, useful: int | None = None) -> None:
    tokens, columns = X.shape
    useful = useful or tokens * columns * (columns + 1)
    benchmark.extra_info["useful Gflop/s"] = round(useful / benchmark.stats.stats.min * 1e-9)
    benchmark.extra_info["threads"] = machine.threads()
    peaks = machine.peak()
    benchmark.extra_info |= {f"peak {name} Gflop/s": round(rate) for name, rate in peaks.items()}


def note_bytes(benchmark, least: int) -> None:
    benchmark.extra_info["GB/s"] = round(least / benchmark.stats.stats.min * 1e-9, 1)
    benchmark.extra_info["threads"] = machine.threads()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2048, HIDDEN), (512, FF)], ids=str)
def test_hessian(benchmark, shape, dtype):
    """All weights 1."""
    X, H = activations(*shape, dtype), torch.zeros(shape[1], shape[1])
    benchmark.pedantic(hessian_, args=(H, X), **ROUNDS)
    note_flops(benchmark, X)


@pytest.mark.parametrize("distinct", [23, 2048])
def test_weighted(benchmark, distinct):
    """One weight per language keeps the bf16 dot product; one per token needs fp32."""
    X, H = activations(2048, HIDDEN, torch.bfloat16), torch.zeros(HIDDEN, HIDDEN)
    weights = 1 + (torch.arange(2048) * 7 % distinct) / distinct
    benchmark.pedantic(hessian_, args=(H, X, weights), **ROUNDS)
    note_flops(benchmark, X)


def test_ruler_textbook(benchmark):
    """The published way: inputs widened to fp32, full X^T X added to H."""
    X, H = activations(2048, HIDDEN, torch.bfloat16), torch.zeros(HIDDEN, HIDDEN)
    benchmark.pedantic(lambda: H.add_(X.float().t() @ X.float()), **ROUNDS)
    note_flops(benchmark, X)


def test_ruler_tuned(benchmark):
    """torch with one conversion and no temporary."""
    X, H = activations(2048, HIDDEN, torch.bfloat16), torch.zeros(HIDDEN, HIDDEN)

    def add():
        x = X.float()
        H.addmm_(x.t(), x)

    benchmark.pedantic(add, **ROUNDS)
    note_flops(benchmark, X)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", CROSS, ids=str)
def test_cross(benchmark, shape, dtype):
    """The cross moment of two inputs; of equal width twice the tiles of test_hessian."""
    tokens, rows, columns = shape
    Y, X = activations(tokens, rows, dtype).neg(), activations(tokens, columns, dtype)
    benchmark.pedantic(cross_, args=(torch.zeros(rows, columns), Y, X), **ROUNDS)
    note_flops(benchmark, X, 2 * X.numel() * rows)


@pytest.mark.parametrize("shape", CROSS, ids=str)
def test_ruler_cross(benchmark, shape):
    """The same in torch: one conversion of each input and no temporary."""
    tokens, rows, columns = shape
    Y, X = (activations(tokens, n, torch.bfloat16) for n in (rows, columns))
    G = torch.zeros(rows, columns)
    benchmark.pedantic(lambda: G.addmm_(Y.float().t(), X.float()), **ROUNDS)
    note_flops(benchmark, X, 2 * X.numel() * rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_column_squares(benchmark, dtype):
    """Wanda's statistic: X read once."""
    X, s = activations(2048, FF, dtype), torch.zeros(FF)
    benchmark.pedantic(column_sq_, args=(s, X), **ROUNDS)
    note_bytes(benchmark, X.numel() * X.element_size())


def test_ruler_column_squares(benchmark):
    """The same in torch."""
    X, s = activations(2048, FF, torch.bfloat16), torch.zeros(FF)
    benchmark.pedantic(lambda: s.add_(X.float().square().sum(0)), **ROUNDS)
    note_bytes(benchmark, X.numel() * X.element_size())


def test_symmetrize(benchmark):
    """Half of H read, half written."""
    H = torch.zeros(HIDDEN, HIDDEN)
    benchmark.pedantic(symmetrize_, args=(H,), **ROUNDS)
    note_bytes(benchmark, H.numel() * 4)


def test_ruler_symmetrize(benchmark):
    """The same in torch: the upper triangle plus its strict transpose."""
    H = torch.zeros(HIDDEN, HIDDEN)
    benchmark.pedantic(lambda: H.triu() + H.triu(1).t(), **ROUNDS)
    note_bytes(benchmark, H.numel() * 4)
