"""The sweep at Aya-23-8B's layer shapes: q/o 4096 x 4096, gate/up 14336 x 4096, given the factor.

Gflop/s counts rows * cols^2 (the panel GEMM of a left-looking sweep, both its flops) per second of
CPU time, beside the measured one-thread peak. For one thread: OMP_NUM_THREADS=1.
"""

import time

import pytest
import torch

from distaya_ext.ops import machine
from distaya_ext.ops.obs import Quant, quantize, sweep_

SHAPES = [(4096, 4096), (14336, 4096)]
MODES = {
    "50%": {"sparsity": 0.5},
    "2:4": {"nm": (2, 4)},
    "int4 g128": {"quant": Quant(4, 128)},
    "2:4 int4 g128": {"nm": (2, 4), "quant": Quant(4, 128)},
}


def weights(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def factor(cols: int) -> torch.Tensor:
    """A well-conditioned R: speed does not depend on more than that."""
    R = torch.triu(torch.randn(cols, cols, generator=torch.Generator().manual_seed(1)) * 0.01)
    R.diagonal().fill_(1.0)
    return R


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sweep(benchmark, shape, mode):
    W, R = weights(*shape), factor(shape[1])
    seconds = []

    def run(W: torch.Tensor) -> None:
        start = time.process_time()
        sweep_(W, R, **MODES[mode])
        seconds.append(time.process_time() - start)

    benchmark.pedantic(run, setup=lambda: ((W.clone(),), {}), rounds=3, warmup_rounds=1)
    rows, cols = shape
    benchmark.extra_info["cpu_seconds"] = round(min(seconds), 4)
    benchmark.extra_info["gflops"] = round(rows * cols**2 / min(seconds) * 1e-9, 1)
    benchmark.extra_info["peak_one_thread"] = round(machine.peak()["fp32"], 1)
    benchmark.extra_info["threads"] = machine.threads()


@pytest.mark.parametrize("scale", ["minmax", "mse"])
def test_round_to_nearest(benchmark, scale):
    """Grids and codes of a 4096 x 4096 matrix, bf16: read once, or 80 times for the MSE search."""
    W = weights(4096, 4096).bfloat16()
    benchmark.pedantic(quantize, args=(W, Quant(4, 128, scale=scale)), rounds=3, warmup_rounds=1)
    benchmark.extra_info["Mweights/s"] = round(W.numel() / benchmark.stats.stats.min * 1e-6)
    benchmark.extra_info["threads"] = machine.threads()
