"""Refit and one ADMM iteration at Aya's shapes, next to plain torch and to the products alone.

Each iteration holds one product of 2 * rows * cols^2 flop; Gflop/s counts nothing else, per second
of CPU time, beside the measured one-thread peak. For one thread: OMP_NUM_THREADS=1.
"""

import time

import pytest
import torch

from bench import refined
from distaya_ext.ops import machine
from distaya_ext.ops import mask as mask_op
from distaya_ext.ops import refit as room

SHAPES = [(2048, 2048), (4096, 4096)]
ITERATIONS = 10


def make(rows: int, cols: int):
    """W, its 2:4 mask and an H: speed does not depend on more than that rows go on searching."""
    random = {"generator": torch.Generator().manual_seed(0)}
    W = torch.randn(rows, cols, **random)
    X = torch.randn(cols + 64, cols, **random) * torch.logspace(0, -1, cols)
    H = torch.addmm(torch.full((cols, cols), 0.01), X.t(), X, alpha=1 / len(X))
    return W, mask_op.keep_nm(mask_op.magnitude(W), 2, 4), H


def record(benchmark, run, flop: float, rounds: int = 3) -> None:
    seconds = []

    def timed() -> None:
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)

    benchmark.pedantic(timed, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["cpu_seconds"] = round(min(seconds), 4)
    benchmark.extra_info["gflops"] = round(flop / min(seconds) * 1e-9, 1)
    benchmark.extra_info["peak_one_thread"] = round(machine.peak()["fp32"], 1)
    benchmark.extra_info["threads"] = machine.threads()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", ["ours", "torch", "products alone"])
def test_refit(benchmark, shape, way):
    W, mask, H = make(*shape)
    C = torch.zeros_like(W)

    def products() -> None:
        for _ in range(ITERATIONS + 1):
            room.multiply_(C, W, H)

    ways = {
        "ours": lambda: room.refit(W, mask, H, iterations=ITERATIONS),
        "torch": lambda: refined.refit(W, mask, H, iterations=ITERATIONS),
        "products alone": products,
    }
    record(benchmark, ways[way], (ITERATIONS + 1) * 2.0 * shape[0] * shape[1] ** 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", ["ours", "torch"])
def test_admm_iteration(benchmark, shape, way):
    G, mask, inverse = make(*shape)
    X, Y = torch.empty_like(G), G.clone()
    ways = {
        "ours": lambda: room.admm_(G, X, mask, Y, inverse, 1e-3, 1.0),
        "torch": lambda: refined.admm_iteration(G, mask, Y, inverse, 1.0),
    }
    record(benchmark, ways[way], 2.0 * shape[0] * shape[1] ** 2)
